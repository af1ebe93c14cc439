"""What the reports of results/SCRIPT share."""
import json
from statistics import mean, stdev


def pm(values, digits=2):
    """mean ± standard deviation of the seeds; of one seed its value."""
    text = f"{mean(values):.{digits}f}"
    return text + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def groups(rows, same, *experiments):
    """Rows of these experiments that agree in `same` (a function of a row), so differ in the seed only, in order of
    their first line."""
    found = {}
    for r in rows:
        if r["experiment"] in experiments:
            found.setdefault(json.dumps(same(r)), []).append(r)
    return list(found.values())
