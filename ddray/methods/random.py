"""Random: `ipc` real images of each class, drawn without repetition (the field's first baseline).

**Deviations**: none; the papers give no more than this.
"""

from typing import Final

from ddray.config import Config
from ddray.methods.families.matching.initial import initial_images
from ddray.methods.families.selection import apart, selection_method

METHOD: Final = selection_method(
    Config, lambda ctx, config: initial_images(ctx, "random", repeat=False), coupling=apart
)
