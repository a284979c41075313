"""The limits of all cases, and the count of them at the end."""

import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(__file__))


@pytest.fixture(autouse=True)
def limits():
    import harness

    with harness.bounded_addresses():
        yield


def pytest_terminal_summary(terminalreporter):
    harness = sys.modules.get("harness")
    if not harness or not harness.totals:
        return
    terminalreporter.write_sep("-", "hostile input: cases, of them with a result / with a one-line error; most memory")
    for name, count in harness.totals.items():
        test = name.removeprefix("tests/fuzz/")
        terminalreporter.write_line(
            f"{count['cases']:7,}  {count['results']:7,} / {count['errors']:7,}  {count['MiB']:5,} MiB  {test}"
        )
    terminalreporter.write_line(f"{sum(count['cases'] for count in harness.totals.values()):7,}  in all")
