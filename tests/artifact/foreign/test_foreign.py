"""Sets in other projects' files, each written as its project writes it; what is read, and what is refused."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.artifact.export import export_ddranking
from ddray.artifact.foreign import ForeignRequest
from ddray.artifact.reading import load, load_all
from ddray.data import Dataset, PixelSpace
from ddray.data.pixels import channel_statistics
from ddray.errors import InputError
from tests.artifact.foreign.sets import LABELS, leaf, normal, normalized, pixels


@pytest.fixture
def dataset(toy: Any) -> Dataset:
    opened: Dataset = toy()
    return opened


class TestDcFamily:
    def write(self, path: Path, num_exp: int = 3, num_eval: int = 2) -> Path:
        """DC, DSA, DM: one file over all experiments, written at the end of each."""
        data_save: list[Any] = []
        accs_all_exps: dict[str, list[Any]] = {"ConvNet": []}
        for exp in range(num_exp):
            accs_all_exps["ConvNet"] += [np.float64(0.3 + 0.01 * run) for run in range(num_eval)]
            image_syn = leaf(normal(exp))
            data_save.append([copy.deepcopy(image_syn.detach().cpu()), copy.deepcopy(LABELS.cpu())])
            torch.save({"data": data_save, "accs_all_exps": accs_all_exps}, path)
        return path

    def test_the_sets_of_all_experiments_are_read_together(
        self, dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = self.write(tmp_path / "res_DM_CIFAR10_ConvNet_2ipc.pt")

        with caplog.at_level(logging.INFO):
            sets = load_all(path, ForeignRequest(dataset))

        assert len(sets) == 3
        for exp, loaded in enumerate(sets):
            assert torch.equal(loaded.images, normal(exp))
            assert loaded.labels.tolist() == LABELS.tolist()
            assert loaded.meta.method == f"file:res_DM_CIFAR10_ConvNet_2ipc.pt#{exp}"
        assert "holds 3 sets, one per run: all of them count" in caplog.text

    def test_one_of_them_is_read_by_its_index(self, dataset: Dataset, tmp_path: Path) -> None:
        path = self.write(tmp_path / "res_DC.pt")

        assert torch.equal(load(path, ForeignRequest(dataset), index=1).images, normal(1))
        with pytest.raises(InputError, match=r"--index must be in 0\.\.2 \(.*DC\.pt holds 3 sets\), got 3"):
            load(path, ForeignRequest(dataset), index=3)
        with pytest.raises(InputError, match=r"res_DC\.pt must be read with --index 0\.\.2: .* set per run"):
            load(path, ForeignRequest(dataset))

    def test_a_single_set_needs_no_index(self, dataset: Dataset, tmp_path: Path) -> None:
        loaded = load(self.write(tmp_path / "res_DSA.pt", num_exp=1), ForeignRequest(dataset))

        assert torch.equal(loaded.images, normal())
        assert (loaded.meta.ipc, loaded.meta.arch, loaded.meta.pixel_space) == (2, "convnet3", "normalized")
        assert loaded.meta.mean == dataset.mean

    @pytest.mark.parametrize("accuracies", [{"ConvNet": [0.1, 0.2, 0.3]}, None])
    def test_a_file_that_tells_no_runs_from_looks_needs_one(
        self, accuracies: Any, dataset: Dataset, tmp_path: Path
    ) -> None:
        contents = {"data": [[normal(), LABELS], [normal(1), LABELS]], "accs_all_exps": accuracies}
        torch.save(contents if accuracies else {"data": contents["data"]}, tmp_path / "res_x.pt")

        with pytest.raises(InputError, match=r"which of its 2 sets count.*add --index N \(0\.\.1\)"):
            load(tmp_path / "res_x.pt", ForeignRequest(dataset))
        assert torch.equal(load(tmp_path / "res_x.pt", ForeignRequest(dataset), index=0).images, normal())


class TestDataDam:
    def write(self, path: Path, num_looks: int = 4) -> Path:
        """A set per look during the run; the accuracies are noted after the last save."""
        data_save: list[Any] = []
        accs_all_exps: dict[str, list[float]] = {"ConvNet": []}
        for look in range(num_looks):
            data_save.append([copy.deepcopy(leaf(normal(look)).detach().cpu()), copy.deepcopy(LABELS)])
            torch.save({"data": data_save, "accs_all_exps": accs_all_exps}, path)
        return path

    @pytest.mark.parametrize("name", ["res_DataDAM_CIFAR10_ConvNet_2ipc_.pt", "renamed.pt"])
    def test_the_last_look_is_the_set(
        self, name: str, dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = self.write(tmp_path / name)

        assert torch.equal(load(path, ForeignRequest(dataset)).images, normal(3))
        assert f"{name} holds 4 sets: number 3 (from 0) is read, the last" in caplog.text
        caplog.clear()
        assert torch.equal(load(path, ForeignRequest(dataset), index=1).images, normal(1))
        assert "holds 4 sets: number 1 (from 0) is read, --index 1" in caplog.text

    def test_several_experiments_are_a_series_too(self, dataset: Dataset, tmp_path: Path) -> None:
        data = [[normal(look), LABELS] for look in range(4)]
        torch.save({"data": data, "accs_all_exps": {"ConvNet": [0.5] * 4}}, tmp_path / "res_DataDAM_x.pt")

        assert torch.equal(load(tmp_path / "res_DataDAM_x.pt", ForeignRequest(dataset)).images, normal(3))

    def test_the_released_form_has_one_set(self, dataset: Dataset, tmp_path: Path) -> None:
        torch.save({"data": [normal(), LABELS]}, tmp_path / "syn_data_cifar10_ipc_2.pt")

        loaded = load(tmp_path / "syn_data_cifar10_ipc_2.pt", ForeignRequest(dataset))

        assert torch.equal(loaded.images, normal())
        assert loaded.labels.tolist() == LABELS.tolist()


class TestTrajectories:
    """MTT and DATM save what they distil by iteration, and the best."""

    def write(self, folder: Path, labels: Tensor, lr: Tensor | None, tag: str = "best") -> Path:
        folder.mkdir()
        torch.save(normal().cpu(), folder / f"images_{tag}.pt")
        torch.save(labels.cpu(), folder / f"labels_{tag}.pt")
        if lr is not None:
            torch.save(lr.detach().cpu(), folder / f"lr_{tag}.pt")
        return folder / f"images_{tag}.pt"

    def test_mtts_pair_with_its_rate(self, dataset: Dataset, tmp_path: Path) -> None:
        loaded = load(self.write(tmp_path / "a", LABELS, torch.tensor(0.0213)), ForeignRequest(dataset))

        assert torch.equal(loaded.images, normal())
        assert loaded.labels.tolist() == LABELS.tolist()
        assert loaded.soft_labels is None
        assert loaded.meta.config == {"evaluate": {"lr": "learned"}}
        assert loaded.meta.learned_lr == pytest.approx(0.0213)

    def test_datms_logits_are_soft_labels(self, dataset: Dataset, tmp_path: Path) -> None:
        logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(1)) * 4
        path = self.write(
            tmp_path / "a", logits.clone().requires_grad_(True), leaf(torch.tensor(0.01)), "5000"
        )

        loaded = load(path, ForeignRequest(dataset))

        assert loaded.meta.label_kind == "logits"
        assert torch.equal(loaded.soft_labels, logits)
        assert loaded.labels.tolist() == logits.argmax(1).tolist()
        assert loaded.meta.storage_floats == 6 * 3 * 16 * 16 + 6 * 3
        train = loaded.decode()
        assert torch.equal(train.supervision, logits.softmax(1))
        loaded.save(tmp_path / "ours.pt")
        again = load(tmp_path / "ours.pt")
        assert torch.equal(again.soft_labels, loaded.soft_labels)
        assert torch.equal(again.labels, loaded.labels)
        assert again.meta == loaded.meta

    def test_a_folder_is_read_as_the_set_in_it(self, dataset: Dataset, tmp_path: Path) -> None:
        path = self.write(tmp_path / "a", LABELS, None)

        loaded = load(path.parent, ForeignRequest(dataset))
        assert torch.equal(loaded.images, normal())
        assert loaded.meta.config == {}
        torch.save(normal(), path.parent / "images.pt")
        with pytest.raises(InputError, match=r"must hold one set, got images\.pt, images_best\.pt: name one"):
            load(path.parent, ForeignRequest(dataset))

    def test_what_is_refused(self, dataset: Dataset, tmp_path: Path) -> None:
        wide = self.write(tmp_path / "wide", torch.randn(6, 7), None)
        with pytest.raises(InputError, match=r"soft labels must be \[N, 3\] for toy, got \[6, 7\]"):
            load(wide, ForeignRequest(dataset))
        rate = self.write(tmp_path / "rate", LABELS, torch.tensor(-0.1))
        with pytest.raises(InputError, match=r"lr_best\.pt must hold a learning rate > 0, got tensor\(-0\.1"):
            load(rate, ForeignRequest(dataset))
        torch.save(normal(), tmp_path / "images_zca_500.pt")
        with pytest.raises(InputError, match=r"read images_500\.pt with --pixel-space zca"):
            load(tmp_path / "images_zca_500.pt", ForeignRequest(dataset))


class TestIdc:
    def write(self, path: Path, images: Tensor, labels: Tensor = LABELS) -> Path:
        torch.save([leaf(images).detach().cpu(), labels.cpu()], path)
        return path

    @staticmethod
    def decoded(img: Tensor, factor: int) -> Tensor:
        """`decode_zoom` of IDC's code (padding with grey, cutting, bilinear), part after part."""
        size = img.shape[-1]
        remained = size % factor
        if remained > 0:
            img = F.pad(img, pad=(0, factor - remained, 0, factor - remained), value=0.5)
        crop = -(-size // factor)
        parts = [
            img[:, :, i * crop : (i + 1) * crop, j * crop : (j + 1) * crop]
            for i in range(factor)
            for j in range(factor)
        ]
        return torch.nn.Upsample(size=size, mode="bilinear")(torch.cat(parts))

    @pytest.mark.parametrize(("factor", "size"), [(1, 16), (2, 16), (3, 16), (3, 28)])
    def test_pixels_are_decoded_and_normalised(
        self, factor: int, size: int, toy: Any, tmp_path: Path
    ) -> None:
        dataset = toy(shape=(3, size, size))
        path = self.write(tmp_path / "data.pt", pixels(size=size))

        loaded = load(path, ForeignRequest(dataset, factor=factor))

        parts = factor**2
        expected = normalized(self.decoded(pixels(size=size), factor), dataset)
        expected = expected.view(parts, 6, 3, size, size).transpose(0, 1).flatten(0, 1)
        # Their code normalises what is up-sampled; the padding's grey is cut off before.
        torch.testing.assert_close(loaded.decode().images, expected)
        assert loaded.labels.tolist() == LABELS.repeat_interleave(parts).tolist()
        meta = loaded.meta
        assert (meta.ipc, meta.ipc_decoded, meta.storage_floats) == (2, 2 * parts, 6 * 3 * size * size)
        assert meta.config == {"method": {"factor": factor}}

    def test_undecoded_it_is_refused(self, dataset: Dataset, tmp_path: Path) -> None:
        path = self.write(tmp_path / "data.pt", pixels())

        with pytest.raises(
            InputError, match=r"data\.pt must be read with --factor N, the parts.*not say; 1 if they are"
        ):
            load(path, ForeignRequest(dataset))
        (tmp_path / "args.txt").write_text(json.dumps({"ipc": 2, "factor": 2, "dataset": "cifar10"}))
        with pytest.raises(InputError, match=r"does not say \(args\.txt says 2\); 1 if"):
            load(path, ForeignRequest(dataset))

    def test_values_that_are_no_pixels_are_refused(self, dataset: Dataset, tmp_path: Path) -> None:
        path = self.write(tmp_path / "data.pt", normal())

        with pytest.raises(InputError, match=r"must hold pixels in 0\.\.1, got -.*--pixel-space normalized"):
            load(path, ForeignRequest(dataset, factor=1))
        space = PixelSpace("normalized", dataset.mean, dataset.std)
        request = ForeignRequest(dataset, lambda: space, factor=1)
        assert torch.equal(load(path, request).images, normal())
        slightly = pixels() * 1.2 - 0.1  # after the last step they are not clamped
        loaded = load(self.write(path, slightly), ForeignRequest(dataset, factor=1))
        torch.testing.assert_close(loaded.images, normalized(slightly, dataset))

    def test_spectrograms_are_cut_along_time(self, sounds: Dataset, tmp_path: Path) -> None:
        stored = sounds.train().images[:4]
        path = self.write(tmp_path / "data.pt", stored, torch.tensor([0, 0, 1, 1]))

        loaded = load(path, ForeignRequest(sounds, factor=2))

        halves = torch.stack([stored[..., :32], stored[..., 32:]], 1).flatten(0, 1)
        expected = F.interpolate((halves - 0.1) / 0.9, (64, 64), mode="bilinear", align_corners=False)
        torch.testing.assert_close(loaded.images, expected)
        assert (loaded.meta.ipc, loaded.meta.ipc_decoded) == (2, 4)

    def test_more_parts_than_pixels_are_refused(self, dataset: Dataset, tmp_path: Path) -> None:
        path = self.write(tmp_path / "data.pt", pixels())

        with pytest.raises(InputError, match="factor must be at most the image's side of 16 px, got 17"):
            load(path, ForeignRequest(dataset, factor=17))


class TestIdm:
    def write(self, path: Path) -> Path:
        with path.open("wb") as file:
            pickle.dump((leaf(normal()).detach(), LABELS), file)
        return path

    def test_a_pickle_of_two_tensors_is_cut_apart(self, dataset: Dataset, tmp_path: Path) -> None:
        loaded = load(self.write(tmp_path / "acc_0.67.pkl"), ForeignRequest(dataset, factor=2))

        corners = [(slice(0, 8), slice(0, 8)), (slice(0, 8), slice(8, 16))]
        corners += [(slice(8, 16), slice(0, 8)), (slice(8, 16), slice(8, 16))]
        up = torch.nn.Upsample(scale_factor=2, mode="bilinear")
        expected = torch.stack([up(normal()[:, :, rows, columns]) for rows, columns in corners], 1)
        torch.testing.assert_close(loaded.images, expected.flatten(0, 1))
        assert loaded.labels.tolist() == LABELS.repeat_interleave(4).tolist()

    def test_it_does_not_say_whether_it_is(self, dataset: Dataset, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"--factor N, .* \(2 under its --aug\); 1 if they are whole"):
            load(self.write(tmp_path / "acc_0.67.pkl"), ForeignRequest(dataset))

    def test_other_objects_are_not_unpickled(self, dataset: Dataset, tmp_path: Path) -> None:
        marker = tmp_path / "marker"

        class Bomb:
            def __reduce__(self) -> Any:
                return open, (str(marker), "w")

        for contents in ((normal(), Bomb()), Bomb()):
            with (tmp_path / "acc_1.pkl").open("wb") as file:
                pickle.dump(contents, file)
            with pytest.raises(InputError, match="holds objects that could run code, which are never loaded"):
                load(tmp_path / "acc_1.pkl", ForeignRequest(dataset, factor=1))
        assert not marker.exists()


class TestKip:
    def write(self, path: Path, labels: Any) -> Path:
        np.savez(path, images=normal().permute(0, 2, 3, 1).numpy(), labels=labels)
        return path

    def test_images_by_channels_last_with_centred_labels(
        self, dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        one_hot = F.one_hot(LABELS, 3).double().numpy() - 1 / 3
        path = self.write(tmp_path / "ConvNet_ssize6_nozca_nol_noaug_ckpt1000.npz", one_hot)

        loaded = load(path, ForeignRequest(dataset))

        assert torch.equal(loaded.images, normal())
        assert loaded.labels.tolist() == LABELS.tolist()
        measured = channel_statistics(dataset.train().images)
        assert (loaded.meta.mean, loaded.meta.std) == measured
        assert "value per class" not in caplog.text

    def test_learned_labels_lose_all_but_their_class_with_a_word(
        self, dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        values = torch.randn(6, 3, generator=torch.Generator().manual_seed(2))

        loaded = load(self.write(tmp_path / "ConvNet_nozca_l.npz", values.numpy()), ForeignRequest(dataset))

        assert loaded.labels.tolist() == values.argmax(1).tolist()
        assert "has a value per class: each image gets the class of its largest one" in caplog.text

    def test_its_whitening_is_not_ours(self, dataset: Dataset, tmp_path: Path) -> None:
        path = self.write(tmp_path / "kip_cifar10_ConvNet3_ssize6_zca_nol_noaug_ckpt1000.npz", LABELS.numpy())

        with pytest.raises(InputError, match=r"KIP's own whitening.*add --pixel-space zca"):
            load(path, ForeignRequest(dataset))
        space = PixelSpace("zca", zca_mean=torch.zeros(768), zca_matrix=torch.eye(768))
        assert torch.equal(load(path, ForeignRequest(dataset, lambda: space)).images, normal())

    def test_arrays_of_objects_are_not_loaded(self, dataset: Dataset, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", images=np.array([object()], dtype=object), labels=np.zeros(1))

        with pytest.raises(InputError, match="which are never loaded"):
            load(tmp_path / "a.npz", ForeignRequest(dataset))


class TestKrrSt:
    def write(self, folder: Path, y_syn: Tensor) -> Path:
        torch.save(leaf(normal()), folder / "x_syn.pt")
        torch.save(y_syn, folder / "y_syn.pt")
        return folder / "x_syn.pt"

    def test_representations_are_targets(self, dataset: Dataset, tmp_path: Path) -> None:
        y_syn = torch.randn(6, 512)

        loaded = load(self.write(tmp_path, leaf(y_syn)), ForeignRequest(dataset))

        assert torch.equal(loaded.images, normal())
        assert loaded.targets is not None
        assert torch.equal(loaded.targets, y_syn)
        assert not loaded.images.requires_grad
        meta = loaded.meta
        assert (meta.budget, meta.storage_floats) == (6, 6 * (768 + 512))
        assert meta.config["evaluate"]["lr"] == 0.1

    def test_other_methods_sets_have_labels(self, dataset: Dataset, tmp_path: Path) -> None:
        assert load(self.write(tmp_path, LABELS), ForeignRequest(dataset)).labels.tolist() == LABELS.tolist()
        values = F.one_hot(LABELS, 3) / 2.0  # FRePo's
        loaded = load(self.write(tmp_path, values), ForeignRequest(dataset))
        assert loaded.labels.tolist() == LABELS.tolist()
        assert loaded.targets is None


class TestDcBench:
    @pytest.mark.parametrize("stem", ["CIFAR10_IPC2_normalize", "CIFAR10_IPC2"])
    def test_random_and_k_means_images(self, stem: str, dataset: Dataset, tmp_path: Path) -> None:
        torch.save(normal(), tmp_path / f"{stem}_images.pt")
        torch.save(LABELS.float(), tmp_path / f"{stem}_labels.pt")

        loaded = load(tmp_path / f"{stem}_images.pt", ForeignRequest(dataset))

        assert torch.equal(loaded.images, normal())
        assert loaded.labels.tolist() == LABELS.tolist()

    def test_a_set_in_several_files_is_read_as_one(self, dataset: Dataset, tmp_path: Path) -> None:
        for part in range(3):
            torch.save(normal()[2 * part : 2 * part + 2], tmp_path / f"images_best_{part}.pt")
            torch.save(LABELS[2 * part : 2 * part + 2], tmp_path / f"labels_best_{part}.pt")

        loaded = load(tmp_path / "images_best_1.pt", ForeignRequest(dataset))

        assert torch.equal(loaded.images, normal())
        assert loaded.labels.tolist() == LABELS.tolist()


class TestDdRanking:
    def write(self, folder: Path, labels: Tensor | None, lr: Any = None) -> Path:
        folder.mkdir()
        for name, value in (("images", normal()), ("labels", labels), ("lr", lr)):
            if value is not None:
                torch.save(value, folder / f"{name}.pt")
        return folder

    def test_images_labels_and_rate(self, dataset: Dataset, tmp_path: Path) -> None:
        logits = F.one_hot(LABELS, 3).float() * 5

        loaded = load(self.write(tmp_path / "a", logits, 0.02), ForeignRequest(dataset))

        assert torch.equal(loaded.images, normal())
        assert torch.equal(loaded.soft_labels, logits)
        assert loaded.meta.config == {"evaluate": {"lr": "learned"}}
        assert (loaded.meta.label_kind, loaded.meta.learned_lr) == ("logits", 0.02)

    def test_without_labels_the_images_are_sorted_by_class(
        self, dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        loaded = load(self.write(tmp_path / "a", None) / "images.pt", ForeignRequest(dataset))

        assert loaded.labels.tolist() == LABELS.tolist()
        assert "no labels.pt beside it: its images are taken as sorted by class" in caplog.text

    @pytest.mark.parametrize("soft", [False, True])
    def test_what_is_exported_is_read_again(self, soft: bool, dataset: Dataset, tmp_path: Path) -> None:
        order = torch.tensor([5, 0, 3, 1, 4, 2])
        labels = torch.randn(6, 3) * 3 if soft else LABELS[order]
        images = self.write(tmp_path / "a", labels, torch.tensor(0.03))
        distilled = load(images, ForeignRequest(dataset))

        export_ddranking(distilled, tmp_path / "out")

        assert {file.name for file in (tmp_path / "out").iterdir()} == {"images.pt", "labels.pt", "lr.pt"}
        sorted_rows = distilled.labels.argsort(stable=True)
        again = load(tmp_path / "out", ForeignRequest(dataset))
        assert torch.equal(again.images, distilled.images[sorted_rows])
        assert again.labels.tolist() == sorted(distilled.labels.tolist())
        if soft:
            assert torch.equal(again.soft_labels, distilled.soft_labels[sorted_rows])
        assert again.meta.learned_lr == pytest.approx(0.03)
        with pytest.raises(InputError, match="the folder to export to must be new"):
            export_ddranking(distilled, tmp_path / "out")
