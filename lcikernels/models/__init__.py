"""The causal LM of this package, known to transformers' Auto classes once this is imported.

It needs transformers: pip install lcikernels[growth].
"""

try:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
except ImportError as error:
    why = f"lcikernels.models needs transformers: pip install 'lcikernels[growth]' ({error})"
    raise type(error)(why, name=error.name) from error

from lcikernels.models.config import LCIConfig
from lcikernels.models.lm import LCIForCausalLM, LCIModel

AutoConfig.register(LCIConfig.model_type, LCIConfig)
AutoModel.register(LCIConfig, LCIModel)
AutoModelForCausalLM.register(LCIConfig, LCIForCausalLM)

__all__ = ["LCIConfig", "LCIForCausalLM", "LCIModel"]
