"""DM: dataset condensation with distribution matching (Zhao & Bilen, WACV 2023; Eq 6, Algorithm 1).

Each step draws a fresh random network and minimises sum_c ||mean emb(real_c) - mean emb(syn_c)||^2 over the
synthetic images, both under the same augmentation.

**Deviations** (paper and authors' code agree on every setting; both presets are the same)

- The authors' code takes ConvNets class by class and BatchNorm networks in one batch; ours takes all classes
  in one pass, which is the same sum.
- augmentation and network seeds: wall clock | derived from the run's seed.
"""

from typing import Final

from ddray.methods.families.matching.means import MatchingConfig, coupling_of, means_method

METHOD: Final = means_method(
    MatchingConfig, lambda net, images: (net.features(images).embedding,), coupling=coupling_of
)
