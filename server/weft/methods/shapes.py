"""Types of tensors with the names of their axes: `Float[Tensor, "R I"]` is a tensor of R rows and I columns.

Names are those of the shape legend (methods/protocol.py), `*T` stands for any number of axes, and a single axis has a
space before it. They are notes: to Python and to pyright each of these types is the tensor's. In the tests jaxtyping,
which reads them, takes the place of this module (tests/shapes.py), and checks the sizes in every call.
"""

from typing import Annotated as Bool
from typing import Annotated as Float
from typing import Annotated as Float32
from typing import Annotated as Int

__all__ = ["Bool", "Float", "Float32", "Int"]
