"""pytest in a process of its own, on a copy: `python child.py RESULT ROOT PACKAGES SECONDS ARGUMENT...`.

Run as a script. RESULT becomes a JSON file: pytest's exit status, where the packages came from, and the first failure.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# What a test says that looks at a wrong answer. Anything else that is raised is an accident, and counted apart.
ASSERTIONS = {"AssertionError", "Failed", "GradcheckError", "OpCheckError"}


class Witness:
    """Notes the first failure."""

    def __init__(self) -> None:
        self.failure: dict[str, Any] | None = None

    def pytest_sessionstart(self) -> None:
        """After conftest chose a profile: a failure is enough, nobody reads the smallest one."""
        phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
        settings = hypothesis.settings(hypothesis.settings.default, phases=phases, report_multiple_bugs=False)
        hypothesis.settings.register_profile("first failure", settings)
        hypothesis.settings.load_profile("first failure")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        report = yield
        if report.failed and self.failure is None and call.excinfo is not None:
            errors = flattened(call.excinfo.value)
            self.failure = {
                "test": item.nodeid,
                "when": call.when,
                "asserted": call.when == "call" and any(is_assertion(error) for error in errors),
                "error": f"{type(errors[0]).__name__}: {str(errors[0]).strip()}"[:300],
            }
        return report

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and self.failure is None:
            self.failure = {
                "test": report.nodeid,
                "when": "collect",
                "asserted": False,
                "error": report.longreprtext[-300:],
            }


def flattened(error: BaseException) -> list[BaseException]:
    """The errors of a group, which hypothesis makes of several."""
    inner = getattr(error, "exceptions", None)
    return [e for part in inner for e in flattened(part)] if inner else [error]


def is_assertion(error: BaseException) -> bool:
    return any(kind.__name__ in ASSERTIONS for kind in type(error).__mro__)


def main(result: str, root: str, packages: str, seconds: str, *arguments: str) -> int:
    limit = int(seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
    # In place of this script's folder: imports come from the copy. conftest reads the arguments off sys.argv.
    sys.path[0] = root
    sys.argv[1:] = arguments
    witness = Witness()
    status = pytest.main(list(arguments), plugins=[witness])
    own = {n: m for n, m in sys.modules.items() if n.split(".")[0] in packages.split(",")}
    loaded = {n: str(m.__file__) for n, m in own.items() if getattr(m, "__file__", 0)}
    used = resource.getrusage(resource.RUSAGE_SELF)
    text = {"status": int(status), "loaded": loaded, "failure": witness.failure, "cpu": used.ru_utime + used.ru_stime}
    Path(result).write_text(json.dumps(text))
    return int(status)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
