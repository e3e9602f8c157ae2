"""`python -m ternlm`."""

from ternlm.cli import main

if __name__ == "__main__":
    main()
