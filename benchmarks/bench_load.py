"""Answer how well weightcache loads, beside what people use today, on this machine.

Questions (each runs alone with `--only`, by the beginning of its name):

    traffic-*       Does a cold load fetch each byte once, and a warm one no chunk? Counted by a proxy.
    herd            Do 8 processes at once on an empty cache cost the origin at most 1.05 times the bytes?
    disk-cold-*     With a cold page cache: from a folder, and from the disk tier, no slower than safetensors' load_file
                    with every page touched?
    disk-warm-*     With a warm page cache: no slower than load_file with each tensor cloned?
    origin-*        From SeaweedFS on loopback: cold, verified and written to disk behind, no slower than boto3, s3fs and
                    huggingface_hub downloads followed by load_file?
    plan-bind-*     Are 6,000 tensors planned in 0.5 s and bound in 20 ms?

    and in all of them: is the memory beside the tensors at most 256 MiB?

Models: Llama-3.2-1B's names and shapes with random bytes (2.5 GB, two shards; 0.25 GB with --quick), 6,000 small tensors
(0.2 GB), and the real all-MiniLM-L6-v2 (90 MB).

    python benchmarks/bench_load.py --quick                 about 8 minutes; shows that it works, not how fast
    python benchmarks/bench_load.py --out results.json      about 40 minutes, 22 GB of disk; for a quiet machine

Run:ai's streamer and fastsafetensors take part where they are installed (pip install -r benchmarks/peers.txt).

How it is measured. Each run has a process of its own. The cases of a question take turns, and each round begins with
another one; a first round is thrown away. Imports are done before the clock starts, ours and the peers'; making a client
is not. The clock stops when a byte of every page of every tensor has been read. Cold means synced, dropped from the page
cache, and checked; the virtual disk below may have a cache of its own, which is why the first round is thrown away.
Before the clock, as much free memory as the model needs is touched and freed again: a host that takes back its guest's
free memory would otherwise decide the result (first_touch_s_per_gib in the machine's line: as found, and again at once).
After the clock, the bytes of all tensors are hashed: all loaders of a model must have delivered the same. Peak memory is
resident memory above that after the imports; mapped files count, which for load_file is the page cache's own memory.
weightcache's tensors from the disk tier are verified, from an origin verified and durable in the end (the column "until
stored", for peers with an fsync of what they downloaded); a plain folder is read in place, as by the peers, unverified.
"""

from __future__ import annotations

import suite
from questions import QUESTIONS
from rows import GB

DISK_NEEDED = {True: 5 * GB, False: 22 * GB}  # by --quick

if __name__ == "__main__":
    suite.main(__doc__, QUESTIONS, DISK_NEEDED)
