"""A fuzzer: damaged images and files, and everything that virt-bmap does with them. docs/fuzzing.md says how
to run it.

    seeds.py       small images of every format, made by the tests' recipes
    disk.py        a scratch copy that is damaged in place and mended again
    damage.py      what is done to bytes; where the bytes lie that matter
    growth.py      a disk made much larger by holes, with the fields that say its size
    sealing/       checksums put right again, so that damage reaches the code behind them
    images.py      a damaged image: one mutation of a seed
    beside.py      a damaged file beside images: maps, traces, profiles, ranges, logs
    invariants.py  what holds for every map, whatever it was made of
    consumers.py   what people do with a map
    worker.py      the process that does mutations, one after the other, and says what became of them
    campaign.py    the workers' watchdog and bookkeeper
    again.py       one mutation again, its image, a smaller one

A mutation is a function of a seed and a number, and of nothing else.
"""
