"""Pipelines of diffusers that are opened as no flow model, each with its reason."""

from __future__ import annotations

_BY_REASON = {
    "It makes videos or three-dimensional shapes, not images: use it with diffusers itself.": """
        AllegroPipeline AnimateDiffControlNetPipeline AnimateDiffPAGPipeline AnimateDiffPipeline AnimateDiffSDXLPipeline
        AnimateDiffSparseControlNetPipeline AnimateDiffVideoToVideoControlNetPipeline AnimateDiffVideoToVideoPipeline
        AnyFlowFARPipeline AnyFlowPipeline ChronoEditPipeline CogVideoXFunControlPipeline CogVideoXImageToVideoPipeline
        CogVideoXPipeline CogVideoXVideoToVideoPipeline ConsisIDPipeline Cosmos2VideoToWorldPipeline
        Cosmos2_5_PredictBasePipeline Cosmos2_5_TransferPipeline Cosmos3OmniPipeline CosmosTextToWorldPipeline
        CosmosVideoToWorldPipeline EasyAnimateControlPipeline EasyAnimateInpaintPipeline EasyAnimatePipeline
        HeliosPipeline HeliosPyramidPipeline HunyuanSkyreelsImageToVideoPipeline HunyuanVideo15ImageToVideoPipeline
        HunyuanVideo15Pipeline HunyuanVideoFramepackPipeline HunyuanVideoImageToVideoPipeline HunyuanVideoPipeline
        I2VGenXLPipeline Kandinsky5I2VPipeline Kandinsky5T2VPipeline Kandinsky6SRPipeline Kandinsky6TI2VAPipeline
        LTX2ConditionPipeline LTX2DFRPipeline LTX2DFRTemporalRefinePipeline LTX2HDRPipeline LTX2ImageToVideoPipeline
        LTX2InContextPipeline LTX2LatentUpsamplePipeline LTX2Pipeline LTX2VideoDiffusionDecodePipeline
        LTXConditionPipeline LTXI2VLongMultiPromptPipeline LTXImageToVideoPipeline LTXLatentUpsamplePipeline LTXPipeline
        LattePipeline LucyEditPipeline MochiPipeline MotifVideoImage2VideoPipeline MotifVideoPipeline PIAPipeline
        SanaImageToVideoPipeline SanaVideoPipeline SanaWMLTX2Refiner SanaWMPipeline ShapEImg2ImgPipeline ShapEPipeline
        SkyReelsV2DiffusionForcingImageToVideoPipeline SkyReelsV2DiffusionForcingPipeline
        SkyReelsV2DiffusionForcingVideoToVideoPipeline SkyReelsV2ImageToVideoPipeline SkyReelsV2Pipeline
        StableVideoDiffusionPipeline TextToVideoSDPipeline TextToVideoZeroPipeline TextToVideoZeroSDXLPipeline
        VideoToVideoSDPipeline WanAnimatePipeline WanImageToVideoPipeline WanPipeline WanVACEPipeline
        WanVideoToVideoPipeline""",
    "It makes sound, text or molecules, not images: use it with diffusers itself.": """
        AceStepPipeline AudioDiffusionPipeline AudioLDM2Pipeline AudioLDMPipeline DanceDiffusionPipeline
        DiffusionGemmaPipeline LLaDA2Pipeline LongCatAudioDiTPipeline MusicLDMPipeline RFD4ProteinaPipeline
        SpectrogramDiffusionPipeline StableAudio3AudioToAudioPipeline StableAudio3InpaintPipeline StableAudio3Pipeline
        StableAudioPipeline""",
    "It draws pixels and has no autoencoder, so that there is no latent to flow in: use it with diffusers itself.": """
        ConsistencyModelPipeline DDIMPipeline DDPMPipeline IFImg2ImgPipeline IFImg2ImgSuperResolutionPipeline
        IFInpaintingPipeline IFInpaintingSuperResolutionPipeline IFPipeline IFSuperResolutionPipeline KarrasVePipeline
        PNDMPipeline PRXPixelPipeline RePaintPipeline ScoreSdeVePipeline UnCLIPImageVariationPipeline UnCLIPPipeline""",
    "It draws discrete codes, not continuous latents, so that there is no velocity: use it with diffusers itself.": """
        AmusedImg2ImgPipeline AmusedInpaintPipeline AmusedPipeline VQDiffusionPipeline""",
    "It is a cascade of several models, of which each needs what another makes: use it with diffusers itself.": """
        KandinskyCombinedPipeline KandinskyImg2ImgCombinedPipeline KandinskyImg2ImgPipeline
        KandinskyInpaintCombinedPipeline KandinskyInpaintPipeline KandinskyPipeline KandinskyPriorPipeline
        KandinskyV22CombinedPipeline KandinskyV22ControlnetImg2ImgPipeline KandinskyV22ControlnetPipeline
        KandinskyV22Img2ImgCombinedPipeline KandinskyV22Img2ImgPipeline KandinskyV22InpaintCombinedPipeline
        KandinskyV22InpaintPipeline KandinskyV22Pipeline KandinskyV22PriorEmb2EmbPipeline KandinskyV22PriorPipeline
        StableCascadeCombinedPipeline StableCascadeDecoderPipeline StableCascadePriorPipeline
        StableUnCLIPImg2ImgPipeline StableUnCLIPPipeline WuerstchenCombinedPipeline WuerstchenDecoderPipeline
        WuerstchenPriorPipeline""",
    "It is steered by a ControlNet or an adapter beside the network: open the folder of its base model, which has a "
    "family, or use it with diffusers itself.": """
        BlipDiffusionControlNetPipeline FluxControlNetImg2ImgPipeline FluxControlNetInpaintPipeline
        FluxControlNetPipeline HunyuanDiTControlNetPipeline QwenImageControlNetInpaintPipeline
        QwenImageControlNetPipeline SanaControlNetPipeline StableDiffusion3ControlNetInpaintingPipeline
        StableDiffusion3ControlNetPipeline StableDiffusionAdapterPipeline StableDiffusionControlNetImg2ImgPipeline
        StableDiffusionControlNetInpaintPipeline StableDiffusionControlNetPAGInpaintPipeline
        StableDiffusionControlNetPAGPipeline StableDiffusionControlNetPipeline StableDiffusionControlNetXSPipeline
        StableDiffusionXLAdapterPipeline StableDiffusionXLControlNetImg2ImgPipeline
        StableDiffusionXLControlNetInpaintPipeline StableDiffusionXLControlNetPAGImg2ImgPipeline
        StableDiffusionXLControlNetPAGPipeline StableDiffusionXLControlNetPipeline
        StableDiffusionXLControlNetUnionImg2ImgPipeline StableDiffusionXLControlNetUnionInpaintPipeline
        StableDiffusionXLControlNetUnionPipeline StableDiffusionXLControlNetXSPipeline ZImageControlNetInpaintPipeline
        ZImageControlNetPipeline""",
    "Its network takes or draws a depth map beside the image: use it with diffusers itself.": """
        StableDiffusionDepth2ImgPipeline StableDiffusionLDM3DPipeline""",
    "Its network draws from images that it is given: use it with diffusers itself, or edit with the text-to-image "
    "model of its family.": """
        BlipDiffusionPipeline Flux2KleinKVPipeline FluxPriorReduxPipeline JoyImageEditPipeline JoyImageEditPlusPipeline
        Kandinsky5I2IPipeline PaintByExamplePipeline StableDiffusionGLIGENPipeline
        StableDiffusionGLIGENTextImagePipeline StableDiffusionImageVariationPipeline VisualClozeGenerationPipeline
        VisualClozePipeline""",
    "It makes an image larger or better, and none from a prompt alone: use it with diffusers itself.": """
        HunyuanImageRefinerPipeline LDMSuperResolutionPipeline StableDiffusionLatentUpscalePipeline
        StableDiffusionUpscalePipeline""",
    "It makes several layers of an image at once: use it with diffusers itself.": "QwenImageLayeredPipeline",
    "It estimates depth, normals or materials of an image, and draws none: use it with diffusers itself.": """
        MarigoldDepthPipeline MarigoldIntrinsicsPipeline MarigoldNormalsPipeline""",
    "It is another way to sample or to edit with the weights of Stable Diffusion: name StableDiffusionPipeline or "
    "StableDiffusionXLPipeline in its model_index.json and it opens.": """
        CycleDiffusionPipeline LEditsPPPipelineStableDiffusion LEditsPPPipelineStableDiffusionXL
        SemanticStableDiffusionPipeline StableDiffusionAttendAndExcitePipeline StableDiffusionDiffEditPipeline
        StableDiffusionInpaintPipelineLegacy StableDiffusionModelEditingPipeline StableDiffusionPanoramaPipeline
        StableDiffusionParadigmsPipeline StableDiffusionPipelineSafe StableDiffusionPix2PixZeroPipeline
        StableDiffusionSAGPipeline""",
    "It draws a frame of a model of videos: use it with diffusers itself.": "Cosmos2TextToImagePipeline",
    "It runs on ONNX, not on PyTorch: open the checkpoint that it was exported from.": """
        OnnxStableDiffusionImg2ImgPipeline OnnxStableDiffusionInpaintPipeline OnnxStableDiffusionInpaintPipelineLegacy
        OnnxStableDiffusionPipeline OnnxStableDiffusionUpscalePipeline StableDiffusionOnnxPipeline""",
    "It is an early latent diffusion model that diffusers keeps for its history: use it with diffusers itself.": """
        AltDiffusionImg2ImgPipeline AltDiffusionPipeline Kandinsky3Img2ImgPipeline Kandinsky3Pipeline LDMPipeline
        LDMTextToImagePipeline UniDiffuserPipeline VersatileDiffusionDualGuidedPipeline
        VersatileDiffusionImageVariationPipeline VersatileDiffusionPipeline VersatileDiffusionTextToImagePipeline""",
}

#: class name of a pipeline -> what it is and what can be done with it
LEFT_OUT = {name: reason for reason, names in _BY_REASON.items() for name in names.split()}


def what_to_do(kind: str) -> str:
    """Return what a pipeline class without a family is, or how a family is added, as the second half of an error."""
    return LEFT_OUT.get(kind, "A family is added with one class and one line: see docs/guide/pretrained.md.")
