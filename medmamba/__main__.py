"""``python -m medmamba``: the same as the command ``medmamba``, for ``torchrun -m``."""

from medmamba.cli.app import main

if __name__ == "__main__":
    main()
