"""`python -m examples.digits`: `run`, without what Megatron-Core says of itself when it is imported."""

import logging
import warnings

# Megatron-Core tells which of its optional parts are absent and what it will rename; nothing to do about it.
warnings.filterwarnings("ignore", module="megatron.core")
logging.getLogger("megatron.core").setLevel(logging.ERROR)

if __name__ == "__main__":
    from examples.digits.run import main

    main()
