"""Make one HTML page of a run, or of several side by side.

python eval/report.py runs/digits runs/digits-fitnet --output report.html
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from vkd_gen.cli import announce, check_output_file, repository_path, run_command


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What to show."""

    folders: tyro.conf.Positional[tuple[str, ...]]
    """Folders of recipes' runs, or of eval/score.py."""
    output: str = "report.html"
    """File to write."""

    def __post_init__(self) -> None:
        """Check what can be checked without loading anything."""
        if not self.folders:
            raise ValueError("name at least one folder of a run or of scores")


def main(config: ReportConfig) -> None:
    """Write the page."""
    if Path(config.output).is_dir():
        raise ValueError(f"--output {config.output} is a folder; name a file, such as {config.output}/report.html")
    check_output_file(config.output)
    announce(f"a report of {', '.join(config.folders)}")

    from vkd_gen.evaluation.report import write_report  # loads torch, which takes seconds: flags are read before

    write_report([Path(repository_path(folder, __file__)) for folder in config.folders], Path(config.output))
    print(f"report: {config.output}")


if __name__ == "__main__":
    run_command(main, ReportConfig, __doc__)
