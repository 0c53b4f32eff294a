"""Words that several studies say."""

from __future__ import annotations

from gpu_layers.study.claims import Text

FIVE_ERRORS = Text(
    "by chance alone, even the largest of a hundred such distances exceeds it less than once in 10,000 times",
    "若仅由偶然造成，即使取一百个中的最大值，超出此界的概率也不到万分之一",
)
ROUNDING = Text(
    "rounding errors of float64, some 1e-16 each, and room for their sum",
    "float64 的舍入误差（每次约 1e-16），并为误差累积留有余量",
)
EXACT = Text("the same bits, or not", "逐位比较，要么相同，要么不同")
COUNTED = Text("counted, not estimated", "是计数，不是估计")
