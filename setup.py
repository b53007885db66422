"""What pyproject.toml cannot say: a build writes down what it was made from. Everything else stands there."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "src"))

from narrowboat.machine.build import RECORD, facts_for_a_build, write_facts  # noqa: E402


class BuildWithFacts(build_py):
    """Begins with an empty folder, since modules that earlier builds left would be shipped; ends with the facts."""

    def run(self) -> None:
        """Build the packages. An editable install gets no file: it asks git each time."""
        package = Path(self.build_lib) / "narrowboat"
        if not self.editable_mode:
            shutil.rmtree(package, ignore_errors=True)
        super().run()
        if not self.editable_mode:
            write_facts(facts_for_a_build(ROOT), package)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """The file is one of them."""
        outputs = list(super().get_outputs(include_bytecode))
        return outputs if self.editable_mode else [*outputs, str(Path(self.build_lib) / "narrowboat" / RECORD)]


class SdistWithFacts(sdist):
    """Carries the facts to those who build from it, and have no git history."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Put the files together."""
        super().make_release_tree(base_dir, files)
        package = Path(base_dir) / "src" / "narrowboat"
        (package / RECORD).unlink(missing_ok=True)  # it may be a second name of the file that is built from
        write_facts(facts_for_a_build(ROOT), package)


setup(cmdclass={"build_py": BuildWithFacts, "sdist": SdistWithFacts})
