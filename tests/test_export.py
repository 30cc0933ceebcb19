"""What is guaranteed of models used elsewhere: other precisions, copies, traces and exports."""
import copy

import pytest
import torch

from maskformer import MaskFormer, PerPixelBaseline, PerPixelBaselinePlus

SWIN = "swin_tiny_patch4_window7_224"
OTHER_SHAPES = [(1, 3, 64, 96), (3, 3, 96, 64), (1, 3, 70, 101)]
needs_export = pytest.mark.skipif(torch.__version__ < "2.7", reason="fails with older exporters")


def small(backbone="resnet10t", decoder_layers=1, **options):
    """A MaskFormer of 5 classes and 7 queries in eval mode, with random weights."""
    torch.manual_seed(0)
    model = MaskFormer(5, backbone, pretrained=False, num_queries=7, dim=32, heads=4, ffn_dim=48,
                       decoder_layers=decoder_layers, **options)
    return model.eval()


def photos(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator)


# --------------------------------------------------------------------------------------- precisions
@pytest.mark.parametrize("backbone, dtype", [("resnet10t", torch.bfloat16),
                                             ("resnet10t", torch.float16),
                                             (SWIN, torch.bfloat16)])
@torch.no_grad()
def test_a_model_in_half_precision_gives_nearly_the_same_logits_in_float32(backbone, dtype):
    model = small(backbone, encoder_layers=1)
    images = photos(2, 3, 64, 96)
    expected = model(images)
    for logits, reference in zip(model.to(dtype)(images), expected):
        error = (logits - reference).abs().max() / reference.abs().max()
        assert logits.dtype == torch.float32
        assert 0 < error < 8 * torch.finfo(dtype).eps        # measured: 1.2 to 3.8 eps


@torch.no_grad()
def test_a_bfloat16_model_takes_images_of_any_type():
    model = small().bfloat16()
    images = photos(1, 3, 64, 64)                            # bfloat16 holds 0..255 exactly
    expected = model(images)
    for dtype in (torch.float32, torch.bfloat16):
        logits = model(images.to(dtype))
        assert all(torch.equal(a, b) for a, b in zip(logits, expected)), dtype


@pytest.mark.parametrize("baseline", [PerPixelBaseline, PerPixelBaselinePlus])
@torch.no_grad()
def test_the_per_pixel_baselines_run_in_bfloat16(baseline):
    torch.manual_seed(0)
    model = baseline(5, "resnet10t", pretrained=False, dim=32).eval()
    images = photos(1, 3, 64, 96)
    expected = model(images)
    logits = model.bfloat16()(images)
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().max() < 8 * 2 ** -7 * expected.abs().max()


def test_a_bfloat16_model_has_a_gradient_for_every_parameter():
    model = small(decoder_layers=2, encoder_layers=1).bfloat16().train()
    class_logits, mask_logits = model(photos(2, 3, 64, 64))
    (class_logits.square().mean() + mask_logits.square().mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


# ------------------------------------------------------------------------------------------- copies
@torch.no_grad()
def test_a_deep_copy_predicts_the_same_and_shares_nothing():
    model = small(freeze_bn=True)
    images = photos(1, 3, 64, 64)
    expected = model(images)
    twin = copy.deepcopy(model)
    assert all(torch.equal(a, b) for a, b in zip(twin(images), expected))

    for parameter in twin.parameters():
        parameter.zero_()
    assert all(torch.equal(a, b) for a, b in zip(model(images), expected))
    assert not any(norm.training for norm in twin.train().backbone.batch_norms())


# ------------------------------------------------------------------------------------------- graphs
def assert_equal_for_other_shapes(exported, model):
    """A graph that was recorded for 2 images of 64x96 gives the model's logits for other shapes."""
    for shape in OTHER_SHAPES:
        images = photos(*shape)
        for logits, expected in zip(exported(images), model(images)):
            assert logits.shape == expected.shape
            assert torch.allclose(logits, expected, atol=1e-5), shape


def exported_program(model):
    auto = torch.export.Dim.AUTO
    return torch.export.export(model, (photos(2, 3, 64, 96),),
                               dynamic_shapes=({0: auto, 2: auto, 3: auto},))


@pytest.mark.filterwarnings("ignore")                        # of the tracer, for every shape
@torch.no_grad()
def test_a_traced_model_takes_any_batch_height_and_width():
    model = small(encoder_layers=1)
    traced = torch.jit.trace(model, photos(2, 3, 64, 96), check_trace=False)
    assert_equal_for_other_shapes(traced, model)


@needs_export
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_an_exported_model_takes_any_batch_height_and_width():
    model = small("test_resnet")
    assert_equal_for_other_shapes(exported_program(model).module(), model)


@needs_export
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_onnxruntime_runs_the_model_with_any_batch_height_and_width(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model = small()
    path = str(tmp_path / "model.onnx")
    program = torch.onnx.export(exported_program(model), dynamo=True, optimize=False, verbose=False)
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    [images_in] = session.get_inputs()

    def run(images):
        outputs = session.run(None, {images_in.name: images.numpy()})
        return [torch.from_numpy(output) for output in outputs]

    assert_equal_for_other_shapes(run, model)
