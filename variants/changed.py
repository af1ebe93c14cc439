"""A copy of a script whose functions a variant may replace: the script itself, and other variants, stay as they are."""
import importlib.util
from pathlib import Path


def copy_of(script):
    """A copy of a script's module, whose functions a file of variants/ may replace without touching the script's."""
    path = Path(__file__).resolve().parent.parent / f"{script}.py"
    spec = importlib.util.spec_from_file_location(f"copy of {script}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
