"""A model's parts: where they are in a checkpoint, and transformers' classes that run them.

Importing this package makes transformers know the classes of models that lack sub-blocks or share
them, so that their checkpoints load without `trust_remote_code`.
"""

from compresso.models.structure import register

MODEL_TYPES = register()
