"""DC: dataset condensation with gradient matching (Zhao et al., ICLR 2021; Algorithm 1, Eq 9-10).

Each step draws a random network; `outer_loop` times the synthetic images are moved so that, class by class,
the network's gradient on them matches its gradient on real images (cosine by layer and output), and the
network is trained on them for `inner_loop` epochs in between.

**Deviations** (paper and authors' code agree on every setting; both presets are the same)

- loops are published for ipc 1, 10, 20, ..., 50 | other ipc take those of the next lower one.
- iterations: 1,001 | 1,000.
- network optimiser: momentum .5 in an early version of the code, none since | none.
- evaluation on MNIST: with DC's own crop, scale and rotation | without any, as elsewhere.
- network seeds: wall clock | derived from the run's seed.
"""

from typing import Final

from ddray.methods.families.matching.gradients import GradientConfig, gradient_method

METHOD: Final = gradient_method(GradientConfig, {"epochs": 300, "augment": "none"})
