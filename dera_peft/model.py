"""`DeRaModel`: the mixture that is loaded from, saved to and exported to files."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dera_peft.checkpoint.adapters import detach_adapter
from dera_peft.checkpoint.export import export
from dera_peft.checkpoint.formats import Format
from dera_peft.checkpoint.loading import load_adapter, save
from dera_peft.checkpoint.push import push
from dera_peft.checkpoint.record import Record
from dera_peft.checkpoint.source import ModelSource
from dera_peft.checkpoint.tokenizers import copy_tokenizer
from dera_peft.engine.exact import sample_exact
from dera_peft.engine.mixture import MixtureModel
from dera_peft.engine.noise import row_key
from dera_peft.engine.plan import Branch, check_default_lam
from dera_peft.engine.samples import ExactSample, advice
from dera_peft.engine.turns import in_turn
from dera_peft.errors import DeRaError

PathLike = str | os.PathLike

logger = logging.getLogger(__name__)


class DeRaModel(MixtureModel):
    """
    A base and LoRA adapters, from their folders or hub ids, that decode at any λ; or a base alone, which does so where
    its branches have prompts of their own. See `MixtureModel` for what it computes.

    Attributes:
        record: what it was loaded from, with the adapters that were added and removed since; None for one that was
            made by `from_peft`.
    """

    record: Record | None = None
    _loaded: Record | None = None  # the record before any adapter was added or removed
    _base_arguments: Mapping[str, Any] = {}  # of `from_pretrained`, as the base was loaded

    @classmethod
    def from_pretrained(
        cls,
        base: PathLike | None = None,
        adapter: PathLike | None = None,
        *,
        adapters: Mapping[str, PathLike] | None = None,
        reference: PathLike | Sequence[PathLike] = (),
        stacked: bool | None = None,
        quantization: str | None = None,
        dtype: Any = None,
        device_map: Any = None,
        subfolder: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool | None = None,
        lam: float | Mapping[str, float] | None = None,
        mixing: str | None = None,
        capture: bool | None = None,
        **base_arguments: Any,
    ) -> Self:
        """
        Loads a base and its adapters, checked against each other; or a base alone, whose branches can differ by their
        prompts.

        Args:
            base: hub id or folder of the base, or a folder with a `dera.json`, which names base and adapter. With
                neither that nor an adapter, both branches are the base.
            adapter: hub id or folder of a PEFT LoRA adapter; where its `dera.json` or `adapter_config.json` names the
                base, that may be left out.
            adapters: instead of `adapter`, several aligned models: name -> hub id or folder.
            reference: adapters (one, or a list) that the reference is made of with the base, as an SFT adapter.
            stacked: whether the aligned adapters were trained on top of the reference's, which then are under both
                branches (True), or go on from a copy of them and replace them (False). A `dera.json` of the adapter
                says it; without one it is True unless given.
            quantization: None, "nf4", "fp4" or "int8" (bitsandbytes).
            dtype: a torch dtype or its name; the base's own unless given.
            device_map: as in transformers.
            subfolder: folder within the adapter's folder or hub repository that holds it; within the base's, where
                it is there too.
            revision: commit, branch or tag of a base on the hub; the record's unless given.
            trust_remote_code: whether a base may bring code of its own.
            lam: the default λ, a number or a dict by adapter; the record's, else 1.0.
            mixing: "logits" (DeRa), or "weights" to scale the adapters' weights by λ instead; the record's, else
                "logits".
            capture: whether `generate` records decoding steps as CUDA graphs, where it can and is not told otherwise.
            base_arguments: further arguments of `AutoModelForCausalLM.from_pretrained` (`AutoModelForSeq2SeqLM` where
                the base has an encoder), as `quantization_config` or `attn_implementation`.

        Raises:
            DeRaError: one of them does not exist, cannot be read, or does not fit the other.
        """
        source = ModelSource.read(  # the arguments may be of wider types, which it converts
            base=base,
            adapter=adapter,
            adapters=adapters,
            reference=reference,
            stacked=stacked,
            quantization=quantization,
            dtype=dtype,
            device_map=device_map,
            subfolder=subfolder,
            revision=revision,
            trust_remote_code=trust_remote_code,
            capture=capture,
            base_arguments=base_arguments,
        )
        return cls.from_source(source, lam, mixing)

    @classmethod
    def from_source(
        cls, source: ModelSource, lam: float | Mapping[str, float] | None = None, mixing: str | None = None
    ) -> Self:
        """`from_pretrained`, of a `ModelSource`."""
        loaded = source.load()
        record = loaded.record
        branches = [Branch(name, tuple(names)) for name, names in record.branches.items()]
        lam, mixing = record.lam if lam is None else lam, record.mixing if mixing is None else mixing
        model = cls(loaded.model, branches, lam, mixing)
        model.record = model._loaded = record
        model._base_arguments = source.load_arguments()
        model.capture = source.capture
        return model

    def __repr__(self) -> str:
        """One line; `model.base` shows the modules."""
        base = self.config.name_or_path if self.record is None else self.record.base
        adapters = {branch.name: list(branch.adapters) for branch in self.branches if branch.name in self.aligned}
        return f"{type(self).__name__}(base={base!r}, aligned={adapters}, lam={self.lam}, mixing={self.mixing!r})"

    @in_turn
    def sample_exact(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        particles: int,
        lam: Any = None,
        max_new_tokens: int = 128,
        seed: int = 0,
        **kwargs: Any,
    ) -> list[ExactSample]:
        """
        Samples the mixture of the theory, over whole completions, which `generate` approximates token by token: by
        sequential Monte Carlo with so many particles, each of which costs what a completion of `generate` costs.

        The nearer to exact the more particles there are. Where their weights were so uneven that the sample may be
        farther than 0.1 nats from the exact mixture, a warning says how many are wanted.

        Args:
            input_ids: `[B, S]`, padded on the left, as for `generate`.
            attention_mask: `[B, S]`.
            particles: N, for each prompt. With one it is token-level DeRa, whose log Z_t are added up in `log_z`.
            lam: λ, as for `generate`.
            seed: of all random numbers; those of a prompt depend on its place in the batch, and on no other prompt.
            kwargs: the model's other inputs, and what `generate` takes to say where a completion ends or how keys and
                values are cached.

        Returns:
            One for each prompt.

        Raises:
            DeRaError: an argument would have tokens drawn from something else (`temperature`, `top_p`, `num_beams`, …);
                or λ does not fit.
        """
        self._check_wrapped()
        first = input_ids if input_ids is not None else kwargs.get("inputs_embeds")
        if first is None:
            raise DeRaError("input_ids is missing: give the prompts' token ids.")
        samples = sample_exact(
            self,
            input_ids,
            particles,
            [row_key(seed, place, 0) for place in range(len(first))],
            attention_mask=attention_mask,
            lam=lam,
            max_new_tokens=max_new_tokens,
            **kwargs,
        )
        if (message := advice(samples)) is not None:
            logger.warning(message)
        return samples

    # the options that transformers has for weights are none of an adapter's folder
    @in_turn
    def save_pretrained(  # pyrefly: ignore[bad-override]
        self, save_directory: PathLike, safe_serialization: bool = True, **kwargs
    ) -> None:
        """
        Writes the adapters (PEFT's format) and `dera.json` into one folder; never the base, which is named there.

        `DeRaModel.from_pretrained(save_directory)` restores the model. Other options of transformers' `save_pretrained`
        are refused.
        """
        self._check_wrapped()
        self._check_has_adapter("save_pretrained writes adapters")
        if not safe_serialization:
            raise DeRaError("safe_serialization=False: adapters are only written as safetensors.")
        if kwargs:
            raise DeRaError(
                f"save_pretrained: {next(iter(kwargs))!r} is not supported; it writes one folder, as it is."
            )
        save(self, self.record, save_directory)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
    ) -> str:
        """
        Uploads the adapters with their `dera.json` and a card; never the base, whose hub id is written down there.
        `DeRaModel.from_pretrained(adapter=repo_id)` restores the model. See `checkpoint.push.push` for the arguments.

        Returns:
            The address of the commit, or of the pull request.

        Raises:
            DeRaError: the base is a folder, or the hub refuses.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push(
                folder, repo_id, private=private, token=token, revision=revision, create_pr=create_pr,
                commit_message=commit_message,
            )  # fmt: skip

    # transformers' own makes an untrained adapter of a config: no branch of a mixture
    @in_turn
    def add_adapter(  # pyrefly: ignore[bad-override]
        self, name: str, adapter: PathLike, stacked: bool | None = None
    ) -> None:
        """
        Loads another aligned adapter, as a branch of the name `name`, checked as `from_pretrained` does.

        The default λ, where it is one number, no longer says enough for two branches: pass λ by name from here on, or
        set `model.lam` to a dict.

        Args:
            adapter: hub id or folder.
            stacked: whether it was trained on top of the reference's adapters; its `dera.json`'s word, or else True.

        Raises:
            DeRaError: it is of another base, or its `dera.json` tells of another reference.
        """
        self._check_wrapped()
        self._check_has_adapter("add_adapter adds a further one")
        if not name.isidentifier():
            raise DeRaError(f"name={name!r} can't be a name; use letters, digits and underscores.")
        if name in self.adapters or name in self.peft_model.peft_config:
            raise DeRaError(f"name={name!r} is taken; the model has the branches {list(self.adapters)}.")
        folder, stacked = load_adapter(self, self.record, name, os.fspath(adapter), stacked)
        under = self.branches[0].adapters if stacked else ()
        try:
            self._rewire((*self.branches, Branch(name, (*under, name))))
        except DeRaError:
            detach_adapter(self.peft_model, name)
            raise
        if self.record is not None:
            self._update_record({**self.record.adapters, name: folder})

    @in_turn
    def remove_adapter(self, name: str) -> None:
        """Removes an aligned branch, and its adapter unless another branch has it too."""
        self._check_wrapped()
        if name not in self.aligned:
            raise DeRaError(f"name={name!r} is not an aligned branch; there are {self.aligned}.")
        if len(self.aligned) == 1:
            raise DeRaError(f"name={name!r} is the only aligned branch; a model needs one.")
        remaining = tuple(branch for branch in self.branches if branch.name != name)
        kept = {adapter for branch in remaining for adapter in branch.adapters}
        gone = [adapter for adapter in self.adapters[name] if adapter not in kept]
        self._rewire(remaining)
        for adapter in gone:
            detach_adapter(self.peft_model, adapter)
        if isinstance(self.lam, dict):
            self.lam = check_default_lam({k: self.lam.get(k, 0.0) for k in self.aligned}, self.aligned)
        if self.record is not None:
            self._update_record({name: folder for name, folder in self.record.adapters.items() if name not in gone})

    def _check_has_adapter(self, what: str) -> None:
        if not self.branches_differ:
            raise DeRaError(
                f"{what}, and this model has none: load the base with one (DeRaModel.from_pretrained(base, adapter))."
            )

    def _update_record(self, adapters: dict[str, str]) -> None:
        """After other branches. How it was trained is only known of the adapters that it was loaded with."""
        assert self.record is not None
        assert self._loaded is not None
        branches = {branch.name: list(branch.adapters) for branch in self.branches}
        is_as_loaded = (adapters, branches) == (self._loaded.adapters, self._loaded.branches)
        training = self._loaded.training if is_as_loaded else {}
        self.record = replace(self.record, adapters=adapters, branches=branches, lam=self.lam, training=training)

    @in_turn
    def export(
        self,
        lam: float | Mapping[str, float],
        folder: PathLike,
        prompts: Sequence[Sequence[int]] = (),
        overwrite: bool = False,
        format: Format = "peft",
    ) -> dict:
        """
        Writes one plain PEFT adapter whose weights are scaled by λ, for any server that loads LoRA; or that as
        llama.cpp's file ("gguf"), or merged into the base ("safetensors").

        It is an approximation of DeRa (it mixes weights, not logits); how far it is from it is measured on `prompts`.
        The tokenizer is saved beside it: the adapter's, if it has one, and of a merged model else the base's. See
        `checkpoint.export.export` for arguments, what it returns and raises.
        """
        self._check_wrapped()
        self._check_has_adapter("export writes an adapter")
        fit = export(
            self, lam, folder, prompts, format=format, record=self.record, base_arguments=self._base_arguments,
            overwrite=overwrite,
        )  # fmt: skip
        if self.record is not None and format != "gguf":  # a GGUF base has its own
            copy_tokenizer(self.record, os.fspath(folder), with_base=format == "safetensors")
        return fit


# the names by which transformers' pipelines know a causal language model
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["dera"] = DeRaModel.__name__
