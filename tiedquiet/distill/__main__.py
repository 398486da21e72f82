"""`python -m tiedquiet.distill`; all of it is in `train.py`."""

import sys

if __name__ == "__main__":
    try:
        from tiedquiet.distill.train import run
    except ModuleNotFoundError as error:
        print(
            f"tiedquiet.distill: no module {error.name}; in a checkout of tiedquiet, "
            "python -m pip install '.[distill]' installs what the example needs",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:  # importing takes seconds
        print("tiedquiet.distill: interrupted; nothing was begun", file=sys.stderr)
        sys.exit(130)
    sys.exit(run())
