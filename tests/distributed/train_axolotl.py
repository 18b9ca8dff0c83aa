"""`axolotl train` with several configs, one after the other, with FSDP on a CPU."""

import sys


def main(configs):
    import fsdp_on_cpu  # noqa: F401
    from accelerate.state import AcceleratorState, GradientState
    from axolotl.cli.train import do_cli

    sys.argv = sys.argv[:1]
    for config in configs:
        AcceleratorState._reset_state()
        GradientState._reset_state()
        do_cli(config=config)


if __name__ == "__main__":  # data sets are prepared in processes of their own
    main(sys.argv[1:])
