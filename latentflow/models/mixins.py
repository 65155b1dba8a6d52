"""Mixins of our networks: diffusers' methods for storage in another type and for caches, with what these need here."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import torch
from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
from diffusers.models.cache_utils import CacheMixin

from ..errors import UserError

# diffusers warns, whenever a model changes its precision, of modules that should stay in float32: of none.
logging.getLogger("diffusers.models.modeling_utils").addFilter(
    lambda record: "kept in float32: []" not in record.getMessage()
)

CACHES = (FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig)


class LayerwiseCastingMixin:
    """Storage of a network's weights in another type than that in which it computes."""

    # Few weights, which float8 costs most: measured on emoji-64. diffusers itself leaves out norms.
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = ["embedder", "z_encoder", "final_layer"]

    def enable_layerwise_casting(
        self,
        storage_dtype: torch.dtype = torch.float8_e4m3fn,
        compute_dtype: torch.dtype | None = None,
        *args: Any,
        **options: Any,
    ) -> None:
        """Keep the weights in ``storage_dtype``, and widen each layer's while it computes.

        See ``diffusers.ModelMixin``. Weights that are not narrowed, such as those of norms and the parameters that
        belong to no layer, are brought to ``compute_dtype``: diffusers leaves them, and layers of two types do not go
        together.
        """
        if compute_dtype is not None:
            torch.nn.Module.to(self, compute_dtype)  # type: ignore[call-overload]
        super().enable_layerwise_casting(storage_dtype, compute_dtype, *args, **options)  # type: ignore[misc]


class BlockCacheMixin(CacheMixin):  # type: ignore[misc]
    """Caches of diffusers that suit a row of blocks of one class, evaluated under several conditions in turn."""

    def enable_cache(self, config: Any) -> None:
        """Let later evaluations of a call take blocks' outputs from earlier ones; see ``diffusers.CacheMixin``.

        Raises:
            UserError: the cache expects another architecture.
        """
        if not isinstance(config, CACHES):
            raise UserError(
                f"{type(config).__name__} does not suit {type(self).__name__}",
                f"Use one of {', '.join(kind.__name__ for kind in CACHES)}.",
            )
        if getattr(config, "use_lite_mode", False):
            raise UserError(
                f"{type(self).__name__} has no layer proj_out, which TaylorSeer's lite mode looks for",
                'Name its own: TaylorSeerCacheConfig(cache_identifiers=["final_layer"], '
                'skip_predict_identifiers=[r"blocks\\.\\d+"]).',
            )
        super().enable_cache(config)
