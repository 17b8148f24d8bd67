"""Training: from a folder of text to a model that has learned it.

``corpus`` finds and reads text files, ``tokenizer`` learns byte-level BPE, ``data`` turns files into memory-mapped tokens and draws
batches, ``baselines`` says what a table of counts would achieve, ``loss``, ``optimizer`` and ``loop`` train, ``checkpoint`` saves and
resumes, ``metrics`` and ``plots`` record, and ``run`` puts it all together (``pytransformer train`` is its command line).
"""
