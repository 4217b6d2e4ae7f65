"""In place of SGLang, which needs a GPU: what Ray's server imports of it, and no more."""

from sglang.srt.ray.engine import RayEngine as Engine  # noqa: F401 - before Ray 2.57
