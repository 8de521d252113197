"""The page: everything that the other modules find, put into template.html."""

from collections.abc import Sequence
from pathlib import Path

import clipjax
from clipjax.config import ConfigError
from clipjax.report import classes, curves, folders, scores
from clipjax.report.drawing import colour
from clipjax.report.pictures import SetPictures, pictures
from clipjax.report.reference import read_reference, reference_panels

TEMPLATE = "template.html"


def make_page(
    names: Sequence[str], spec: str | None = None, split: str = "test", reference: str | None = None, load: bool = True
) -> str:
    """HTML that fetches nothing. `names`: workdirs; the others are compared with the first.

    `spec` and `split`: the dataset of the galleries; None: those that the first run evaluates on. `load`: whether the runs are
    loaded for galleries and geometry. Raises ConfigError for what is no workdir and for a wrong table `reference`.
    """
    import jinja2

    known = read_reference(reference) if reference else None  # before the runs are loaded
    found = folders.read_folders(names)
    groups = folders.same_but_for_seed(found)
    shown, note = _pictures(found, spec, split) if load else ([], "")
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals["colour"] = colour
    return environment.get_template(TEMPLATE).render(
        version=clipjax.__version__,
        runs=found,
        groups=groups,
        suites=scores.suites(found, groups),
        last=scores.last_evaluations(found, groups),
        comparisons=scores.comparisons(found),
        training=curves.training_panels(found),
        evaluations=curves.evaluation_panels(found),
        references=reference_panels(found, known) if known else [],
        classes=classes.class_reports(found),
        sets=shown,
        pictures_note=note,
        differences=folders.differences(found),
    )


def _pictures(found: Sequence[folders.Folder], spec: str | None, split: str) -> tuple[list[SetPictures], str]:
    """The pictures, or why there are none: a folder without checkpoints has curves and figures still."""
    try:
        return pictures(found, spec, split), ""
    except ConfigError as error:
        if spec is not None:  # the user asked for them
            raise
        return [], str(error)
