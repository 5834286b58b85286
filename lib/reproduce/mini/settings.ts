import type { Settings } from '../settings.js'

/** Windows of the miniature: each factor gets the same tokens of fine-tuning, one window a step, as in the demo. */
const FACTORS = [2, 4, 8, 16]

/**
 * The miniature's settings, chosen by processor time alone, before any figure of a seed was read: what the demo
 * fine-tunes with (a window a step, 1e-3, cosine), and as many steps as twenty minutes on two cores leave.
 */
export function miniatureSettings(window: number, seed: number, { tokens = TOKENS } = {}): Settings {
  return {
    seed,
    dtype: 'float32',
    extensions: FACTORS.map((factor) => ({
      ...{ factor, batchSize: 1, accumulate: 1 },
      steps: Math.round(tokens / (factor * window)),
    })),
    direct: FACTORS,
    compared: 4,
    comparedTuned: ['ntk', 'yarn'],
    points: 5,
    ...{ learningRate: 1e-3, warmupSteps: 20, schedule: 'cosine', finalFraction: 0.1, maxGradNorm: 1 },
    stride: window / 2,
    documents: 8,
    proofPileTokens: 0,
    passkey: { distances: 16, trials: 5 },
    needle: { depths: 8, trials: 4 },
    ruler: { trials: 8 },
    position: { documents: 8, windows: 4 },
    resolution: { documents: 2, queries: 32, trials: 16 },
    choiceItems: 60,
    summaries: {
      ...{ factor: 4, articleTokens: 768, summaryTokens: 64, epochs: 3, learningRate: 1e-3 },
      ...{ train: 96, test: 16, temperature: 0.5, topP: 0.95 },
    },
    costSteps: 5,
  }
}

/** Tokens of fine-tuning for each factor and method: 300 windows at 16x. */
const TOKENS = 1_228_800

/** A look at everything in a minute: no measurement. */
export function quickSettings(window: number, seed: number): Settings {
  const settings = miniatureSettings(window, seed, { tokens: 24 * 16 * window })
  return {
    ...settings,
    look: true,
    extensions: settings.extensions.filter(({ factor }) => factor <= 4),
    direct: [2, 4],
    comparedTuned: ['ntk'],
    points: 2,
    documents: 2,
    passkey: { distances: 4, trials: 1 },
    needle: { depths: 2, trials: 1 },
    ruler: { trials: 1 },
    position: { documents: 2, windows: 1 },
    resolution: { documents: 1, queries: 4, trials: 2 },
    choiceItems: 6,
    summaries: { ...settings.summaries, train: 4, test: 2, epochs: 1 },
    costSteps: 2,
  }
}
