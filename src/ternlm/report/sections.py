"""What a report shows, in order, made of the record that `record` reads; pages and Markdown render it."""

from collections.abc import Mapping, Sequence
from typing import Any

from ternlm.report.blocks import Section
from ternlm.report.sections_evaluation import evaluation_section, samples_section
from ternlm.report.sections_machine import machine_section
from ternlm.report.sections_origin import (
    alignment_section,
    checkpoints_section,
    origin_section,
    papers_section,
    settings_section,
)
from ternlm.report.sections_several import several_sections
from ternlm.report.sections_summary import summary_section
from ternlm.report.sections_ternary import ternary_section
from ternlm.report.sections_training import events_section, training_section
from ternlm.report.twin import twin_sections

Run = Mapping[str, Any]

MOST_IN_DETAIL = 8
"""Runs of a report of several that are shown one by one as well."""


def sections(record: Mapping[str, Any]) -> list[Section]:
    """The parts of a report on one run or on several.

    Args:
        record: As `record.read_record` returns it.
    """
    runs: Sequence[Run] = record["runs"]
    twin = twin_sections(record["twin"]) if record.get("twin") is not None else []
    if len(runs) == 1:
        first, *others = run_sections(runs[0])
        papers = papers_section(runs[0])
        return [first, *twin, *others, *([] if papers is None else [papers])]
    details = [
        Section(run["name"], tuple(block for part in run_sections(run) for block in part.blocks), is_folded=True)
        for run in runs[:MOST_IN_DETAIL]
    ]
    papers = papers_section(*runs)
    return [*twin, *several_sections(record), *details, *([] if papers is None else [papers])]


def run_sections(run: Run) -> list[Section]:
    """The parts that are about one run, but for papers; those with nothing in them are left out."""
    found = [
        summary_section(run),
        training_section(run),
        evaluation_section(run),
        ternary_section(run),
        samples_section(run),
        alignment_section(run),
        events_section(run),
        machine_section(run),
        origin_section(run),
        checkpoints_section(run),
        settings_section(run),
    ]
    return [section for section in found if section is not None]
