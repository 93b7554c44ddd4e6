"""Python decoding for mmfix: load a vision-language model, generate and stream with a method against hallucination.

>>> from mmfix_decoding import Decoder
>>> decoder = Decoder.from_pretrained("tiny", method="vhr")
>>> decoder.generate("picture.png", "Please describe this image in detail.").text  # doctest: +SKIP
"""

from mmfix_decoding.answer import Answer, TokenEvent
from mmfix_decoding.decoder import Decoder
from mmfix_decoding.images import load_image
from mmfix_decoding.loading import bundled

__all__ = ["Answer", "Decoder", "TokenEvent", "bundled", "load_image"]
