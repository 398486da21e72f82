"""`python -m tiedquiet.distill`; all of it is in `train.py`."""

import sys

from tiedquiet.distill.options import fail

if __name__ == "__main__":
    try:
        from tiedquiet.distill.train import run
    except ModuleNotFoundError as error:
        fail(f"no module {error.name}; pip install 'tiedquiet[distill]'")
    sys.exit(run())
