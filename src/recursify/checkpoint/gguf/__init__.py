"""Reading of ``.gguf`` files: config, weights and tokenizer, from the file alone.

transformers reads GGUF too, but 5.17 and 5.24 drop RoPE scaling, biases that llama.cpp allows, and pre-tokenizers, and
dequantize the whole model. So keys and tensors are read here, and dequantized by the ``gguf`` package; what is not
known is refused.
"""
