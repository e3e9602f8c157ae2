"""Text to ids and back, behind one small interface, for byte, trained BPE and published tokenizers."""

from ternlm.tokenizers.byte import ByteTokenizer
from ternlm.tokenizers.interface import StreamDecoder, Tokenizer
from ternlm.tokenizers.pretrained import load_tokenizer
from ternlm.tokenizers.settings import TokenizerSettings
from ternlm.tokenizers.training import train_bpe

__all__ = ["ByteTokenizer", "StreamDecoder", "Tokenizer", "TokenizerSettings", "load_tokenizer", "train_bpe"]
