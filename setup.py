"""What pyproject.toml cannot say: three folders at the top of the repository travel inside the package.

`qa_dist.common.shipped` finds them, in a checkout as well as installed. Everything else is in pyproject.toml.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("accelerate_configs", "ds_configs", "launch")


class BuildWithShippedFolders(build_py):
    """Adds a copy of each folder as qa_dist/shipped/NAME to what is built."""

    def run(self) -> None:
        """Build the package anew; what an earlier build left beside it would be installed too."""
        if self.editable_mode:
            # An editable installation reads the checkout itself.
            super().run()
            return
        package = Path(self.build_lib) / "qa_dist"
        shutil.rmtree(package, ignore_errors=True)
        super().run()
        for name in SHIPPED:
            shutil.copytree(name, package / "shipped" / name, ignore=shutil.ignore_patterns(".*"))


setup(cmdclass={"build_py": BuildWithShippedFolders})
