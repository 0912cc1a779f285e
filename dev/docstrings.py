"""What griffe, which reads docstrings for the site, is told of ours: `Example:` holds doctests, as its `Examples:`."""

import re

from griffe import Extension, Object


class Doctests(Extension):
    def on_object(self, *, obj: Object, **kwargs) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
