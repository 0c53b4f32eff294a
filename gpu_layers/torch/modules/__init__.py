"""The modules, and the torch.nn class that each replaces."""

from torch import nn

from gpu_layers.torch.modules import batch_norm, dropout, pooling

#: Our class of each torch.nn class that is covered.
COUNTERPARTS: dict[type[nn.Module], type[nn.Module]] = {
    **dropout.COUNTERPARTS,
    **batch_norm.COUNTERPARTS,
    **pooling.COUNTERPARTS,
}
