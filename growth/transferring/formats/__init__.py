"""What a transferred model is written as: our own class, or one that others load and serve."""

from growth.errors import refuse
from growth.families.table import Model
from growth.transferring.formats.fla import FLA
from growth.transferring.formats.format import Format
from growth.transferring.formats.granitemoehybrid import GRANITEMOEHYBRID
from growth.transferring.formats.lci import LCI
from lcikernels.models import LCIConfig

FORMATS = {x.name: x for x in (LCI, GRANITEMOEHYBRID, FLA)}


def format_of(name: str) -> Format:
    """The format of that name, or a refusal that lists them all."""
    if name not in [*FORMATS]:
        raise refuse("format", f"one of {', '.join(FORMATS)}", name, "choose one of these")
    return FORMATS[name]


def written(form: Format, config: LCIConfig) -> Model:
    """The model of this configuration as a format has it.

    Raises Refusal, with the field's name, where it does not hold it, and names the formats that do.
    """
    for limit in form.beyond(config):
        able = [x.name for x in FORMATS.values() if not x.beyond(config)]
        raise refuse(
            limit.field,
            f"{limit.expected}, for the format {form.name}",
            getattr(config, limit.field),
            f"write it as {' or '.join(able)}",
        )
    return form.family.model(form.config(config))
