"""The claims of the field, reproduced: what ``gpu-layers study`` runs."""

from gpu_layers.study import batch_norm, evaluation, mask, placement, pooling, scaling, variance_shift
from gpu_layers.study.claims import Claim, Criterion, Figure, Findings, Outcome, Report, Study, Table, Text
from gpu_layers.study.lab import Lab
from gpu_layers.study.running import run_studies

#: By name, in the order of the page.
STUDIES: dict[str, Study] = {
    module.STUDY.name: module.STUDY
    for module in (scaling, evaluation, placement, batch_norm, variance_shift, pooling, mask)
}

__all__ = [
    "STUDIES",
    "Claim",
    "Criterion",
    "Figure",
    "Findings",
    "Lab",
    "Outcome",
    "Report",
    "Study",
    "Table",
    "Text",
    "run_studies",
]
