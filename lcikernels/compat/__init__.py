"""Other libraries' functions, under their names and signatures, on this package's ops.

    mamba_ssm  causal_conv1d  fla    the functions of the packages of these names
    transformers.py                  patch(): its models call these functions
    serving.py                       which of their arguments are served, and the table of it

Layouts and dtypes are these libraries'; `lcikernels.ops` computes. `SERVED.md` lists every argument.
"""
