/**
 * Everything that `import ... from 'ropewalk'` gives.
 *
 * Shapes stand in brackets: B rows (sequences), T tokens in a row, V vocabulary, D head dimension, P positions. Lengths
 * and contexts are counted in tokens, memory in bytes, losses in nats (natural logarithm), times in seconds. A
 * negative log-likelihood is written nll.
 *
 * A wrong argument or option is a TypeError or a RangeError that names it, its value and the rule; an unknown option
 * is a TypeError. A file or an environment that does not serve is a {@link RopewalkError} with a code. A kernel that
 * fails rejects with an Error of code `ERR_DEVICE`; calls after `dispose` reject with an Error that says so.
 *
 * @categoryDescription Position scaling
 * Pure functions from what a config.json says to rotation frequencies; they need no device. The base frequency of the
 * pair (j, j + D/2) of a head is w = theta^(-2j/D), j = 0 .. D/2 - 1, and position m turns the pair by m w (RoPE, arXiv
 * 2104.09864). With s the `factor`, L the original window, M the config's max_position_embeddings and N the length of
 * the sequence, each type replaces w, and multiplies cos and sin by a scale:
 *
 * | type | w becomes | scale | source |
 * |---|---|---|---|
 * | `default` | w | 1 | arXiv 2104.09864 |
 * | `linear` | w / s: positions are interpolated | 1 | Position Interpolation, arXiv 2306.15595 |
 * | `ntk` | w with theta s^(D/(D-2)) for theta | 1 | NTK-aware scaling (bloc97) |
 * | `dynamic` | for N > M, w with theta (s N/M - s + 1)^(D/(D-2)) for theta | 1 | dynamic NTK (emozilla) |
 * | `yarn` | (1 - r) w + r w / s, r rising from 0 to 1 between the pairs that turn betaFast and betaSlow times in L | 0.1 ln s + 1 | YaRN, arXiv 2309.00071 |
 * | `llama3` | w where its wavelength 2 pi / w is below L / highFreqFactor, w / s above L / lowFreqFactor, a blend between | 1 | Llama 3.1 |
 * | `longrope` | w / f, f of `longFactor` for N > L, else of `shortFactor` | sqrt(1 + ln s / ln L) | LongRoPE, arXiv 2402.13753 |
 *
 * Values and their float32 roundings are those of transformers 5.18 (modeling_rope_utils.py).
 *
 * @packageDocumentation
 */
import { createRequire } from 'node:module'

export { RopewalkError } from './errors.js'
export { type ChoiceItem, type ChoiceTask, readChoiceItems } from './eval/choice-items.js'
export {
  type ChoiceModel,
  type ChoiceOptions,
  type ChoiceRecord,
  type ChoiceResult,
  multipleChoice,
} from './eval/choice.js'
export { needle, type NeedleCell, type NeedleOptions, type NeedleResult } from './eval/needle.js'
export {
  passkey,
  type PasskeyDistance,
  type PasskeyModel,
  type PasskeyOptions,
  type PasskeyResult,
} from './eval/passkey.js'
export {
  type LossModel,
  perplexity,
  type PerplexityOptions,
  type PerplexityResult,
  readTokenDocuments,
  type TokenDocument,
} from './eval/perplexity.js'
export { rouge, type RougeScore, type RougeScores } from './eval/rouge.js'
export {
  type ArticleOptions,
  readArticles,
  summarize,
  type SummaryArticle,
  type SummaryFigure,
  type SummaryLimits,
  type SummaryModel,
  type SummaryOptions,
  type SummaryRecord,
  type SummaryResult,
  writeSummaryExamples,
} from './eval/summaries.js'
export {
  attentionResolution,
  type CopyAccuracy,
  type LayerResolution,
  type ResolutionOptions,
  type ResolutionResult,
  type ScoreRange,
} from './eval/resolution.js'
export { perplexityByPosition, type PositionBin, type PositionOptions, type PositionResult } from './eval/position.js'
export { ruler, type RulerOptions, type RulerResult, type RulerTaskResult, type RulerTrial } from './eval/ruler.js'
export type { RulerTask } from './eval/ruler-tasks.js'
export type { Tokenizer } from './files/tokenizer.js'
export type { TokenProgress } from './files/tokens.js'
export type { BatchOptions, HostTensor, Tokens } from './model/batch.js'
export type { LlamaConfig } from './model/config.js'
export type { GeneratedToken, GenerateOptions, SamplingOptions } from './model/generate.js'
export { type CreateOptions, Llama, type SaveOptions } from './model/llama.js'
export type { LoadOptions } from './model/load.js'
export type { LoraOptions, LoraTarget } from './model/lora.js'
export { PromptCache } from './model/prompt-cache.js'
export {
  extendRope,
  inverseFrequencies,
  ntkTheta,
  readRope,
  type RopeConfig,
  type RopeExtension,
  type RopeType,
  ropeTypes,
  type RopeWindow,
  rotationTable,
  writeRope,
} from './rope.js'
export { Device, type DeviceOptions } from './runtime/device.js'
export type { DeviceMemory } from './runtime/native.js'
export type { ExampleFields } from './files/text.js'
export type { FitFigure, FitSolution, SumFigure, SumRange } from './theory/figures.js'
export type { Statement } from './theory/statements.js'
export { type BoundRatios, type InterpolationBounds, theory, type Theory, type TheoryOptions } from './theory/theory.js'
export type { Packing } from './train/data.js'
export { fit, type FitProblem, type FitResult, type FitSet } from './train/fit.js'
export type { MemoryOptions } from './train/memory.js'
export type { MemoryPeak } from './train/plan.js'
export { type MemoryPlan, plan, type PlannedBytes, type StepEstimate } from './train/planner.js'
export type { PoseOptions } from './train/pose.js'
export type { PlanRequest } from './train/request.js'
export {
  type StepResult,
  Trainer,
  type TrainerOptions,
  type TrainerProgress,
  type TrainerState,
  type TrainingPlan,
} from './train/trainer.js'

/**
 * This package's version, as its package.json has it.
 *
 * @category Devices and errors
 */
export const version: string = (createRequire(import.meta.url)('../package.json') as { version: string }).version
