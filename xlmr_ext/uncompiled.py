"""What a compiled model runs outside of its graph.

Imported only while compiling: ``torch.compiler.disable`` imports the compiler, a second or so.
"""

from __future__ import annotations

import torch

from xlmr_ext import encoder_input
from xlmr_ext.frozen import FrozenEncoder

# Packing reads sizes from the data.
from_padded = torch.compiler.disable(encoder_input.from_padded)

frozen = torch.compiler.disable(FrozenEncoder.forward)
