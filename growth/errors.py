"""The one refusal of this package: a complete sentence, raised before anything is written."""


class Refusal(ValueError):
    """A call that cannot be served. The command line prints the message on one line and exits with code 2."""


def refuse(what: str, expected: object, got: object, remedy: str) -> Refusal:
    """`what: expected ..., got ...; remedy`, ready to be raised."""
    return Refusal(" ".join(f"{what}: expected {expected}, got {got}; {remedy}".split()))
