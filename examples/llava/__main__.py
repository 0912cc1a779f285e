"""LLaVA from parts to a captioning model: convert, train in two stages, caption, export.

python -m examples.llava convert --output work/start
python -m examples.llava train --model work/start --output work/trained
python -m examples.llava caption --model work/trained --image work/start-images/0.png
python -m examples.llava export --model work/trained --output work/exported --dtype bfloat16
"""

import logging
import warnings

# Megatron-Core tells which of its optional parts are absent and what it will rename; nothing to do about it.
warnings.filterwarnings("ignore", module="megatron.core")
logging.getLogger("megatron.core").setLevel(logging.ERROR)

if __name__ == "__main__":
    from examples.llava.run import main

    main()
