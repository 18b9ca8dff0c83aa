"""`axolotl train` on a YAML file, with FSDP or DeepSpeed on a CPU.

torchrun --nproc-per-node 2 train_axolotl.py CONFIG.yaml
"""

import sys


def without_gpu(choose):
    def chosen(loader):
        choose(loader)
        loader.model_kwargs.pop("device_map", None)  # that of ZeRO-2 has the number of the rank's GPU

    return chosen


def main(config):
    import sharding_on_cpu  # noqa: F401
    from axolotl.cli.train import do_cli
    from axolotl.loaders.model import ModelLoader

    ModelLoader._set_device_map_config = without_gpu(ModelLoader._set_device_map_config)
    sys.argv = sys.argv[:1]
    do_cli(config=config)


if __name__ == "__main__":  # data sets are prepared in processes of their own
    main(*sys.argv[1:])
