import type { Finding } from '../report/page.js'
import type { Measurement, Method } from './demo.js'

const ppl = (value: number): string => (value < 100 ? value.toFixed(2) : value.toFixed(0))
const percent = (value: number): string => `${Math.round(100 * value)} %`

/** A change of this much, in either direction, is called none. */
const SLACK = 0.05

/** Holds the paper's claims against what was measured, with the same yardstick whatever came out. */
export function findings(methods: readonly Measurement[], window: number, target: number): Finding[] {
  const of = (method: Method): Measurement => methods.find((entry) => entry.method === method)!
  const [base, raw, tuned, direct] = [of('extrapolated'), of('interpolated'), of('tuned'), of('direct')]
  const at = ({ perplexity }: Measurement, to: number) =>
    perplexity.find((band) => band.from <= to && band.to >= to - 1)!
  const far = (entry: Measurement) => at(entry, target)
  const near = (entry: Measurement) => at(entry, window)
  const keys = ({ passkeyByContext }: Measurement, context: number): number =>
    passkeyByContext.find((entry) => entry.context === context)!.accuracy
  const change = near(tuned).value / near(base).value - 1
  const ahead = far(direct).value / far(tuned).value - 1
  return [
    {
      claim: `Beyond its window of ${window} the base breaks down when it simply reads on`,
      seen: far(base).low > near(base).high,
      figures:
        `perplexity ${ppl(near(base).value)} up to ${window}, ${ppl(far(base).value)} up to ${target}; ` +
        `keys found: ${percent(keys(base, window))} at ${window}, ${percent(keys(base, target))} at ${target}`,
    },
    {
      claim: 'Before any training, interpolated positions do better there than extrapolated ones',
      seen: far(raw).value < far(base).value,
      figures: `perplexity up to ${target}: ${ppl(far(raw).value)} with PI, ${ppl(far(base).value)} without`,
    },
    {
      claim:
        'Before any training, interpolated positions are as good at the end of the new window as near its beginning',
      seen: far(raw).value < near(raw).value * (1 + SLACK),
      figures: `perplexity ${ppl(near(raw).value)} up to ${window}, ${ppl(far(raw).value)} up to ${target}`,
    },
    {
      claim: `After a short fine-tuning it uses the whole new window: more text before a token, lower perplexity`,
      seen: far(tuned).high < near(tuned).low,
      figures: `perplexity ${ppl(near(tuned).value)} up to ${window}, ${ppl(far(tuned).value)} up to ${target}`,
    },
    {
      claim: 'There it predicts better than the base, which reads on beyond its window',
      seen: far(tuned).value * (1 + SLACK) < far(base).value,
      figures: `perplexity up to ${target}: ${ppl(far(tuned).value)} with PI, ${ppl(far(base).value)} extrapolated`,
    },
    {
      claim: `Quality at the original length is kept: perplexity, within ${percent(SLACK)}`,
      seen: change < SLACK,
      figures:
        `perplexity up to ${window}: ${ppl(near(base).value)} before, ${ppl(near(tuned).value)} after ` +
        `(${change < 0 ? '' : '+'}${(100 * change).toFixed(1)} %)`,
    },
    {
      claim: `Quality at the original length is kept: passkeys, within ${percent(2 * SLACK)} of all prompts`,
      seen: keys(tuned, window) >= keys(base, window) - 2 * SLACK,
      figures: `keys found at ${window}: ${percent(keys(base, window))} before, ${percent(keys(tuned, window))} after`,
    },
    {
      claim: 'It finds a passkey wherever it is in the new window',
      seen: tuned.passkeyByDistance.every(({ accuracy }) => accuracy >= 0.2),
      figures: `${percent(keys(tuned, target))} found at ${target}; k_max ${tuned.kmax}`,
    },
    {
      claim: 'The same fine-tuning without interpolation lags behind: perplexity',
      seen: far(tuned).value * (1 + SLACK) < far(direct).value,
      figures:
        `up to ${target}: ${ppl(far(tuned).value)} with PI, ${ppl(far(direct).value)} without` +
        (Math.abs(ahead) < SLACK ? ', a difference below 5 %' : ''),
    },
    {
      claim: 'The same fine-tuning without interpolation lags behind: passkey',
      seen: keys(tuned, target) > keys(direct, target) && tuned.kmax >= direct.kmax,
      figures:
        `at ${target}: ${percent(keys(tuned, target))} with PI, ${percent(keys(direct, target))} without; ` +
        `k_max ${tuned.kmax} and ${direct.kmax}`,
    },
  ]
}
