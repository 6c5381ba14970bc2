"""Models as programs: a folder that turns photos' pixels into embeddings without the model's code.

``save`` writes one of a model, ``load`` runs it. Read in this order: ``contract`` (what a folder
says of itself, and how that is checked), ``lowering`` (a model as StableHLO, the form of each
platform), ``onnx`` (a model as ONNX), ``saving``, ``loading``, ``module`` (a program in a model's
place). The command is ``export_command``'s.
"""

from cbam_jax.export.contract import DTYPES as DTYPES
from cbam_jax.export.contract import is_program as is_program
from cbam_jax.export.loading import Program as Program
from cbam_jax.export.loading import load as load
from cbam_jax.export.module import as_module as as_module
from cbam_jax.export.saving import FORMATS as FORMATS
from cbam_jax.export.saving import check as check
from cbam_jax.export.saving import save as save
