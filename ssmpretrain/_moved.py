"""Former names of modules: importing one gives the module under its present name, with a warning.

A run folder, a recipe or a script may still name a class by its former module. Python asks this finder last, so imports
by present names cost nothing.
"""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_MOVED = {  # (old package, new package): modules
    ("", "run"): "messages option_messages trainer_cli",
    ("", "run.options"): "recipe_parser trainer_options",
    ("commands", "commands.shared"): (
        "encoding evaluation_data figures frozen_encoder new_files paired_embeddings trusted_classes two_towers"
    ),
    ("datamodules", "base"): "byte_sizes cache_folder errors shown_names",
    ("datamodules", "datamodules.decoding"): "batch_memory centre_crop image_header named_images photometric",
    ("datamodules", "datamodules.faults"): "bad_samples shared_lines",
    ("datamodules", "datamodules.files"): "image_files local_files",
    ("datamodules", "datamodules.labels"): "captions classes labelled_sets",
    ("datamodules", "datamodules.order"): "batches plan",
    ("datamodules", "datamodules.remote"): (
        "cache cache_locks download http_deadline http_redirects http_server object_store"
    ),
    ("datamodules", "datamodules.shards"): (
        "classes_beside fetch_ahead folder_index other_readers pack paths remote_index remote_paths verify"
    ),
    ("datamodules", "datamodules.synthetic"): "digits packed_once shape_captions shape_drawing shape_scenes shapes",
    ("encoders", "encoders.features"): "pyramid receptive_field",
    ("encoders", "encoders.layers"): "plain_modules rms_norm state_space",
    ("encoders", "encoders.masking"): "visible_map",
    ("encoders", "encoders.sequence"): "block_stack class_token pos_embed",
    ("encoders", "encoders.weights"): "preprocessing provenance",
    ("objectives", "objectives.contrastive"): (
        "byte_pairs clip mae_clip open_clip_adapter open_clip_export text_tower text_weights"
    ),
    ("objectives", "objectives.masked"): "arm mae patches pretraining simmim",
    ("objectives", "objectives.supervised"): "finetune linear_probe mixing probe_heads probe_report",
    ("training", "base"): "json_lines run_config run_folder whole_files",
    ("training", "evaluation"): "accuracy few_shot nearest_neighbours retrieval zero_shot_accuracy",
    ("training", "training.checkpoints"): "exact_resume",
    ("training", "training.optim"): (
        "global_batch lars layer_decay optimizer_state parameter_table precision schedules"
    ),
    ("training", "training.ranks"): "agreement launcher sharded_tensors",
    ("training", "training.stopping"): "data_wait non_finite preemption slurm",
}
_RENAMED = {
    "commands.devices": "commands.shared.encoding",
    "commands.encoder_images": "commands.shared.encoding",
    "commands.feature_files": "evaluation.feature_files",
    "datamodules.augmentation": "datamodules.decoding.policy",
    "datamodules.changed_shards": "datamodules.shards.shard",
    "datamodules.damaged_shards": "datamodules.shards.damage",
    "datamodules.images_in": "datamodules.open_images",
    "datamodules.index": "datamodules.shards.describe",
    "datamodules.loading": "datamodules.order.loader",
    "datamodules.random_state": "base.seeds",
    "datamodules.reading": "datamodules.tar.sample",
    "datamodules.samples": "datamodules.decoding",
    "datamodules.shard_index": "datamodules.tar.index",
    "datamodules.sources": "datamodules.shards.location",
    "datamodules.tar_headers": "datamodules.tar.headers",
    "datamodules.tar_walk": "datamodules.tar.walk",
    "encoders.checkpoint_file": "encoders.weights.content",
    "encoders.checkpoint_parts": "encoders.weights.content",
    "encoders.checkpoints": "encoders.weights.load",
    "encoders.described": "encoders.weights.build",
    "encoders.export": "encoders.weights.save",
    "encoders.families": "encoders.family_registry",
    "encoders.feature_map": "encoders.features.maps",
    "encoders.filling": "encoders.weights.fill",
    "encoders.finite_weights": "encoders.weights.finite_check",
    "encoders.mamba_text": "encoders.vim.text",
    "encoders.masked_stem": "encoders.masking.stem",
    "encoders.pooled_features": "encoders.features.pooled",
    "encoders.one_node": "encoders.layers.fx_tracing",
    "encoders.recognise": "encoders.vim.family",
    "encoders.recognise_arm": "encoders.arm.family",
    "encoders.recognise_vmamba": "encoders.vmamba.family",
    "encoders.sequence_encoder": "encoders.sequence.encoder",
    "encoders.sidecar": "encoders.weights.on_disk",
    "encoders.spelled": "encoders.timm_name",
    "encoders.traced": "encoders.weights.graphs",
    "encoders.vim_blocks": "encoders.vim.blocks",
    "encoders.visible": "encoders.family",
    "encoders.vmamba_blocks": "encoders.vmamba.blocks",
    "kernels.add_norm.kernels": "kernels.add_norm.triton_kernels",
    "kernels.causal_conv1d.kernels": "kernels.causal_conv1d.triton_kernels",
    "kernels.cross_scan.kernels": "kernels.cross_scan.triton_kernels",
    "kernels.cross_scan.many_states": "kernels.cross_scan.triton",
    "kernels.cross_scan.one_state": "kernels.cross_scan.triton_one_state",
    "kernels.gpu.functions": "kernels.gpu.triton_kernels.functions",
    "kernels.gpu.scan_kernels": "kernels.gpu.triton_kernels",
    "kernels.selective_scan.plain": "kernels.selective_scan.pytorch",
    "kernels.selective_scan.traced": "kernels.selective_scan.exported",
    "objectives.contrast_weights": "objectives.contrastive.head",
    "objectives.contrastive_run": "objectives.restore",
    "objectives.loading": "objectives.restore",
    "objectives.recomputed": "objectives.contrastive.recompute",
    "objectives.zero_shot": "objectives.contrastive.named_classes",
    "recipe_files": "base.yaml_files",
    "run_checks": "run.start.checkpoint_checks",
    "training.any_rank": "training.ranks.reductions",
    "training.checkpoint_files": "training.checkpoints.files",
    "training.checkpoint_folder": "training.checkpoints.folder",
    "training.config_changes": "run.start.config_diff",
    "training.continuing": "run.start.run_start",
    "training.feature_evaluation": "evaluation.features",
    "training.fully_sharded": "training.ranks.fsdp",
    "training.lost_ranks": "training.ranks.roll_call",
    "training.optimizers": "training.optim.adamw",
    "training.run_lock": "run.start.lock",
    "training.stop_signals": "training.stopping.signals",
}


NEW_NAMES = {
    f"ssmpretrain.{old}": f"ssmpretrain.{new}"
    for old, new in (
        *_RENAMED.items(),
        *(
            (f"{old}.{name}".strip("."), f"{new}.{name}")
            for (old, new), names in _MOVED.items()
            for name in names.split()
        ),
    )
}


def keep_former_names() -> None:
    """Let the import system find modules of this package by their former names."""
    if not any(isinstance(finder, _FormerNames) for finder in sys.meta_path):
        sys.meta_path.append(_FormerNames())


class _FormerNames(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in NEW_NAMES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = NEW_NAMES[spec.name]
        warnings.warn(f"{spec.name} is called {new} now. Import that.", FutureWarning, stacklevel=2)
        module = importlib.import_module(new)
        spec.loader_state = module.__spec__  # the import system then replaces it by its own
        return module

    def exec_module(self, module: ModuleType) -> None:
        former = module.__spec__
        if former is not None and former.loader is self:
            module.__spec__ = former.loader_state
