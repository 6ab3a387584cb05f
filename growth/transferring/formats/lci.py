"""Our own class, which holds all that a transfer makes; lcikernels has its layers."""

from growth.families.lci import LCI as FAMILY
from growth.transferring.formats.format import Format

LCI = Format("lci", FAMILY, (), lambda config: config)
