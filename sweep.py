"""Make every combination of options that take lists, several rows at once, and the tables of them all.

python sweep.py --recipe quick --num-experts 2,4,8 --top-k 1,2 --seeds 0-2    # 18 mixtures
python sweep.py --model student --temperature 1,3,10 --alpha 0.5,0.9          # six students of one teacher
python sweep.py --model moe,ffn --preset compact,wide --recipe quick,standard --workers 2
python sweep.py --num-experts 4,8 --cluster tcp://host:8786                   # on other machines: docs/sweeps.md

What is up to date is not made again. Writes each folder's table and plots, and results/sweep.csv and sweep.md.
"""

from mnist_lab.command.entry import run_script
from mnist_lab.command.sweep import SweepOptions, run_sweep

main = run_sweep

if __name__ == "__main__":
    run_script(main, SweepOptions, __doc__)
