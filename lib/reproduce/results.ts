import type { PasskeyResult, PerplexityResult } from '../index.js'
import type { ReportFolder } from './folder.js'
import { idOf, type Method } from './models.js'
import { extensionOf, pointsOf, type Settings, windowOf } from './settings.js'

/** Where results are, for those who measure them and those who show them. */

export const CORPORA = { pg19: 'PG-19', 'proof-pile': 'Proof-pile' } as const
export type Corpus = keyof typeof CORPORA

/** What a unit of perplexity keeps: a result, or why there is none. */
export type PerplexityUnit = PerplexityResult | { leftOut: string }

export const perplexityKey = (corpus: Corpus, id: string, window: number): string =>
  `perplexity/${corpus}/${id}/${window}`

export function perplexityOf(
  folder: ReportFolder,
  corpus: Corpus,
  id: string,
  window: number,
): PerplexityResult | undefined {
  const unit = folder.get<PerplexityUnit>(perplexityKey(corpus, id, window))
  return unit && !('leftOut' in unit) ? unit : undefined
}

export const passkeyKey = (id: string, context: number): string => `passkey/${id}/${context}`

export const passkeyOf = (folder: ReportFolder, id: string, context: number): PasskeyResult | undefined =>
  folder.get<PasskeyResult>(passkeyKey(id, context))

/** Ids of a method's models over the steps, from 0 on. */
export const stepIds = (settings: Settings, method: Method, factor: number): { step: number; id: string }[] =>
  pointsOf(extensionOf(settings, factor), settings.points).map((step) => ({
    step,
    id: idOf({ method, factor, step }),
  }))

/** The id of a method's model after all steps. */
export const finalId = (settings: Settings, method: Method, factor: number): string =>
  idOf({ method, factor, step: method === 'base' ? 0 : extensionOf(settings, factor).steps })

export const largestWindow = ({ extensions }: Settings, window: number): number =>
  Math.max(...extensions.map(({ factor }) => windowOf(window, factor)))
