"""`axolotl train` on a YAML file, with FSDP on a CPU.

torchrun --nproc-per-node 2 train_axolotl.py CONFIG.yaml
"""

import sys


def main(config):
    import sharding_on_cpu  # noqa: F401
    from axolotl.cli.train import do_cli

    sys.argv = sys.argv[:1]
    do_cli(config=config)


if __name__ == "__main__":  # data sets are prepared in processes of their own
    main(*sys.argv[1:])
