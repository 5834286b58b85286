// The paper's mathematics: closed forms, the counterexample to its theorem, the bound that replaces it, and its figures.
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import t from 'tap'
import { theoryPage } from '../../lib/report/theory.js'
import * as bounds from '../../lib/theory/bounds.js'
import { LeastSquares, NormalEquations } from '../../lib/theory/fit.js'
import { normals, uniform } from '../../lib/theory/random.js'
import {
  attentionScore,
  type Coefficients,
  coefficientsOf,
  frequencies,
  interpolationError,
  magnitude,
  variation,
} from '../../lib/theory/score.js'
import { theory } from '../../lib/theory/theory.js'
import { ropewalk } from '../cli/command.js'

const near = (a: number, b: number, relative = 1e-12): boolean => Math.abs(a - b) <= relative * Math.abs(b)
const freqs = frequencies(128, 10000)

function randomCoefficients(pairs: number, random: () => number, unit: boolean): Coefficients {
  const length = Float64Array.from({ length: pairs }, () => (unit ? 1 : random()))
  const angle = Float64Array.from({ length: pairs }, () => 2 * Math.PI * random())
  return { re: length.map((r, j) => r * Math.cos(angle[j]!)), im: length.map((r, j) => r * Math.sin(angle[j]!)) }
}

t.test('a(s) is the product of the query turned by m and the key turned by n, for every m - n = s', async (t) => {
  const f = frequencies(8, 10000)
  t.ok(near(f[1]!, 0.1) && near(f[3]!, 0.001))
  const [q, k] = [normals(8, 1), normals(8, 2)]
  const turned = (x: Float64Array, position: number): Float64Array =>
    x.map((value, i) => {
      const angle = position * f[i >> 1]!
      const other = x[i ^ 1]!
      return value * Math.cos(angle) + (i % 2 === 0 ? -1 : 1) * other * Math.sin(angle)
    })
  const h = coefficientsOf(q, k)
  for (const [m, n] of [
    [5, 5],
    [7, 2],
    [1007, 1002],
    [3, 40],
    [2.5, 0.25],
  ] as const) {
    const product = turned(q, m).reduce((sum, value, i) => sum + value * turned(k, n)[i]!, 0)
    t.ok(Math.abs(product - attentionScore(h, f, m - n)) < 1e-12, `${m}, ${n}`)
  }
  t.ok(near(magnitude({ re: new Float64Array([3, 0]), im: new Float64Array([4, 1]) }), 5))
  t.ok(near(variation({ re: new Float64Array([3, 0]), im: new Float64Array([4, 1]) }), Math.hypot(3, 3)))
})

t.test('the counterexample exceeds the published constant, and is the worst case of the corrected bound', async (t) => {
  const h = { re: freqs.map((f) => Math.cos(f / 2)), im: freqs.map((f) => -Math.sin(f / 2)) }
  t.ok(near(magnitude(h), 1))
  const error = interpolationError(h, freqs, 0, 0.5)
  t.equal(error.toFixed(4), '0.4939')
  t.equal(bounds.publishedInterpolationBound(128, 10000).toFixed(4), '0.4343')
  t.ok(near(error, bounds.worstInterpolation(freqs), 1e-10))
  t.ok(
    near(
      error,
      freqs.reduce((sum, f) => sum + 1 - Math.cos(f / 2), 0),
      1e-10,
    ),
  )
  t.equal(bounds.interpolationBound(128, 10000).toFixed(5), '0.49979')
})

t.test('the corrected bound holds for random heads, coefficients and places; the published one does not', async (t) => {
  const random = uniform(7)
  let [most, exceeded] = [0, 0]
  for (let i = 0; i < 4000; i++) {
    const d = 2 * (1 + Math.floor(64 * random()))
    const c = 10 ** (0.5 + 6 * random())
    const f = frequencies(d, c)
    const h = randomCoefficients(d / 2, random, i % 2 === 0)
    const [from, part] = [Math.floor(4096 * random()), 0.02 + 0.96 * random()]
    const share = interpolationError(h, f, from, part) / magnitude(h) / bounds.interpolationBound(d, c, part)
    most = Math.max(most, share)
    if (bounds.worstInterpolation(f) > bounds.publishedInterpolationBound(d, c)) exceeded++
    // the worst case lies between what random coefficients reach and the bound
    const worst = bounds.worstInterpolation(f, part)
    t.ok(share * bounds.interpolationBound(d, c, part) <= worst * (1 + 1e-9) + 1e-12)
    t.ok(worst <= bounds.interpolationBound(d, c, part) * (1 + 1e-12), `d ${d}, c ${c}`)
  }
  t.ok(most > 0.8 && most <= 1 + 1e-9, `${most}`)
  t.ok(exceeded > 2000, `${exceeded} of 4000`)
})

t.test('B(s): closed forms, and Eq. 8 holds', async (t) => {
  t.ok(near(bounds.extrapolationSum(freqs, 0), (64 * 65) / 2))
  // one pair: |e^(is)| = 1; two of the same frequency: 1 + 2
  t.ok(near(bounds.extrapolationSum(new Float64Array([1]), 12.3), 1))
  t.ok(near(bounds.extrapolationSum(new Float64Array([0.3, 0.3]), 12.3), 3))
  // opposite directions cancel: |1| + |1 - 1|
  t.ok(near(bounds.extrapolationSum(new Float64Array([0, Math.PI]), 1), 1))
  const random = uniform(3)
  for (let i = 0; i < 300; i++) {
    const h = randomCoefficients(64, random, false)
    const s = Math.floor(40000 * random())
    const [score, sum] = [Math.abs(attentionScore(h, freqs, s)), bounds.extrapolationSum(freqs, s)]
    t.ok(score <= variation(h) * sum && variation(h) <= 2 * magnitude(h))
    t.ok(score <= magnitude(h) * bounds.worstScore(128))
  }
  // ... and d/2 is reached
  const s = 5000
  const h = { re: freqs.map((f) => Math.cos(s * f)), im: freqs.map((f) => -Math.sin(s * f)) }
  t.ok(near(attentionScore(h, freqs, s), 64))
})

t.test('separation falls by the factor at small distances and is that of the stretched distance', async (t) => {
  t.ok(near(bounds.separation(freqs, 8, 8), bounds.separation(freqs, 1)))
  const f = frequencies(64, 10000)
  t.ok(near(bounds.separation(f, 1e-6, 4), bounds.separation(f, 1e-6) / 4, 1e-9))
  // |e^(is theta) - 1| summed
  const direct = freqs.reduce((sum, w) => sum + Math.hypot(Math.cos(3 * w) - 1, Math.sin(3 * w)), 0)
  t.ok(near(bounds.separation(freqs, 3), direct))
})

t.test('least squares: an exact system, a ridge, singular values, any number of rows', async (t) => {
  const columns = 5
  for (const rows of [5, 511, 512, 513, 1500]) {
    const [x, w] = [normals(rows * columns, rows), normals(columns, 9)]
    const [qr, n64] = [new LeastSquares(columns), new NormalEquations(columns, Float64Array)]
    const gram = Array.from({ length: columns }, () => new Float64Array(columns))
    for (let i = 0; i < rows; i++) {
      const row = x.subarray(i * columns, (i + 1) * columns)
      const target = row.reduce((sum, value, k) => sum + value * w[k]!, 0)
      qr.add(row, target)
      n64.add(row, target)
      row.forEach((a, k) => row.forEach((b, l) => (gram[k]![l]! += a * b)))
    }
    const solved = qr.solve()
    t.ok(
      solved.every((value, k) => Math.abs(value - w[k]!) < 1e-9),
      `${rows} rows`,
    )
    // a ridge: (X'X + eps) w = X'y with y = X w0
    const ridged = qr.solve(0.5)
    for (let k = 0; k < columns; k++) {
      const left = gram[k]!.reduce((sum, value, l) => sum + value * ridged[l]!, 0.5 * ridged[k]!)
      const right = gram[k]!.reduce((sum, value, l) => sum + value * w[l]!, 0)
      t.ok(Math.abs(left - right) < 1e-8 * rows)
    }
    t.ok(n64.solve(0.5).every((value, k) => Math.abs(value - ridged[k]!) < 1e-8))
    t.strictSame(qr.solve(), solved, 'solving changes nothing')
    const singular = qr.singularValues()
    const trace = gram.reduce((sum, line, k) => sum + line[k]!, 0)
    t.ok(
      near(
        singular.reduce((sum, value) => sum + value * value, 0),
        trace,
        1e-10,
      ),
    )
    t.ok(singular.every((value, k) => k === 0 || value <= singular[k - 1]!))
  }
  // diagonal, with a zero: singular values are what stands there, and the free weight is 0
  const diagonal = new LeastSquares(3)
  for (const [k, value] of [3, 0, 1e-9].entries()) {
    const row = new Float64Array(3)
    row[k] = value
    diagonal.add(row, value * 2)
  }
  t.ok([3, 1e-9, 0].every((value, k) => Math.abs(diagonal.singularValues()[k]! - value) < 1e-15))
  t.strictSame(Array.from(diagonal.solve(), Math.round), [2, 0, 2])
})

const paper = theory()
const holds = (id: string): boolean => paper.statements.find((statement) => statement.id === id)!.holds

t.test("the paper's setting", async (t) => {
  const { ratios, sums, fit } = paper
  t.strictSame(
    [ratios.published, ratios.corrected, ratios.plotted].map((value) => value.toFixed(0)),
    ['589', '512', '572'],
  )
  t.strictSame([sums.values[0], sums.values[1]!.toFixed(2), sums.plotted.median.toFixed(2)], [16.25, '15.77', '2.58'])
  t.strictSame([sums.plotted.min.toFixed(3), sums.plotted.minAt, sums.plotted.below], ['1.116', 3643, 0])
  t.strictSame([sums.extended.min.toFixed(3), sums.extended.minAt], ['0.629', 22297])
  t.equal((100 * sums.extended.below).toFixed(1), '2.7')
  t.equal(sums.values.length, 32768)
  t.ok(sums.values[sums.extended.firstBelow!]! < 1)
  t.notOk(sums.values.slice(0, sums.extended.firstBelow).some((value) => value < 1))
  t.ok(fit.condition > 1e15, 'no solver of float64 can tell the basis from a singular one')
  const of = (solver: string, ridge: number) =>
    fit.solutions.find((entry) => entry.solver === solver && entry.ridge === ridge)!
  const ratio = (solver: string, ridge: number) => of(solver, ridge).outside / of(solver, ridge).inside
  for (const solver of ['qr', 'normal64', 'normal32']) t.ok(ratio(solver, 0) > 10, `${solver} blows up`)
  t.ok(ratio('qr', 0) > 1e3 * ratio('normal64', 0), 'how far is rounding')
  t.ok(near(ratio('normal64', 1e-5), ratio('qr', 1e-5), 1e-4), 'with a ridge both solvers of float64 agree')
  t.ok(near(ratio('normal32', 1), ratio('qr', 1), 1e-3) && ratio('qr', 1) < 2)
  t.ok(of('qr', 1e-5).residual <= of('qr', 1).residual && of('qr', 1).residual < 1, 'a ridge costs residual')
  t.strictSame(
    ['theorem-published', 'theorem-corrected', 'sums-plotted', 'sums-extended', 'fit-ridge', 'fit-height'].map(holds),
    [false, true, true, false, true, false],
  )
})

t.test('the series of Figure 2 are the fit: residual, size and blow-up follow from them', async (t) => {
  const { fit, window } = paper
  t.strictSame([fit.targets.length, fit.scores.length], [window, 2 * window])
  const shown = fit.solutions.find((entry) => entry.solver === 'qr' && entry.ridge === 1e-5)!
  const squares = fit.targets.reduce((sum, target, s) => sum + (fit.scores[s]! - target) ** 2, 0)
  t.ok(near(Math.sqrt(squares / window), shown.residual, 1e-6))
  const largest = (from: number, to: number) => Math.max(...fit.scores.slice(from, to).map(Math.abs))
  t.ok(near(largest(0, window), shown.inside, 1e-6) && near(largest(window, 2 * window), shown.outside, 1e-6))
  t.strictSame([fit.between.s[0], fit.between.s[1], fit.between.s.at(-1)], [25, 25.125, 74.875])
  for (const [i, s] of fit.between.s.entries()) {
    if (Number.isInteger(s)) t.ok(Math.abs(fit.between.scores[i]! - fit.scores[s]!) < 1e-6)
  }
  t.ok(fit.deviation <= bounds.interpolationBound(128, 10000) * shown.magnitude)
  // variance of the targets
  t.ok(Math.abs(fit.targets.reduce((sum, y) => sum + y * y, 0) / window - 1) < 0.1)
})

t.test('other heads, seeds and windows; what is refused', async (t) => {
  const small = { headDim: 16, theta: 1000, window: 64, context: 96 }
  const heard: number[] = []
  const one = theory({ ...small, onProgress: (part) => heard.push(part) })
  t.strictSame(theory(small), one, 'the same numbers again')
  t.notSame(theory({ ...small, seed: 1 }).fit.targets, one.fit.targets)
  t.strictSame(theory({ ...small, seed: 1 }).sums, one.sums, 'only what is random changes')
  t.strictSame(
    [...heard].sort((a, b) => a - b),
    heard,
  )
  t.equal(heard.at(-1), 1)
  t.equal(one.resolution.factors.map(({ factor }) => factor).join(), '1,1.5,2,4,8,16')
  // with a small base and many pairs the published constant is large enough
  const dense = theory({ headDim: 256, theta: 2, window: 256, context: 300 })
  t.equal(dense.statements.find(({ id }) => id === 'theorem-published')!.holds, true)
  t.doesNotThrow(() => theory({ headDim: 2, theta: 10, window: 4, context: 5 }))
  for (const [options, message] of [
    [{ headDim: 7 }, /headDim: 7, but rotary pairs need an even/],
    [{ headDim: 2000 }, /headDim: 2000, .* from 2 to 1024/],
    [{ theta: 1 }, /theta: 1, but it must be finite and above 1/],
    [{ window: 100 }, /window: 100, .* from 128 to/],
    [{ context: 2048 }, /context: 2048, .* from 2049/],
    [{ seed: -1 }, /seed: -1/],
    [{ theta: '1' as never }, /theta: "1", but it must be a number/],
    [{ headdim: 1 } as never, /headdim: no such option/],
  ] as const) {
    t.throws(() => theory(options), { message })
  }
})

t.test('the page: the same bytes twice, whole, with every figure and statement', async (t) => {
  const html = theoryPage(paper, { version: '1.2.3' })
  t.equal(theoryPage(theory(), { version: '1.2.3' }), html)
  t.equal(html.match(/role="img"/g)?.length, 8)
  t.equal(html.match(/<b>(holds|fails)<\/b>/g)?.length, paper.statements.length)
  t.notMatch(html, /NaN|undefined|Infinity|<script|<link|src=|url\(/)
  for (const text of ['0.4939', '589.5', '512.2', '571.6', '22297', 'ropewalk 1.2.3']) t.ok(html.includes(text), text)
  t.match(theoryPage(paper, { version: '1', about: '<model>' }), /&#60;model&#62;/)
  t.ok(html.length < 400_000, `${html.length} bytes`)
})

const dir = mkdtempSync(join(tmpdir(), 'ropewalk-theory-'))
t.teardown(() => rmSync(dir, { recursive: true, force: true }))

const run = (...args: string[]) => ropewalk('theory', ...args)

t.test('ropewalk theory', async (t) => {
  const tiny = ['--head-dim', '16', '--window', '64', '--context', '256']
  const [first, second] = [join(dir, 'a.html'), join(dir, 'b.html')]
  const text = await run(...tiny, '--out', first)
  t.equal(text.code, 0)
  t.match(text.stdout, /^d = 16, c = 10000, L = 64, L' = 256/)
  t.match(text.stdout, /\[fails\] Theorem 2\.1 as published/)
  t.match(text.stderr, /^theory 10\/100 %/)
  const json = await run(...tiny, '--out', second, '--json')
  t.strictSame(readFileSync(first), readFileSync(second))
  const result = JSON.parse(json.stdout)
  t.strictSame(result.sums.values, theory({ headDim: 16, window: 64, context: 256 }).sums.values)
  t.equal(result.out, second)
  const fixture = fileURLToPath(new URL('../fixtures/gqa-d64-linear8', import.meta.url))
  const model = await run(fixture, '--json')
  t.equal(model.code, 0, model.stderr)
  const { headDim, window, context } = JSON.parse(model.stdout)
  t.strictSame([headDim, window, context], [64, 64, 512], 'its factor of 8 has led to the window that its config has')
  const refused = await run('--window', '8')
  t.strictSame([refused.code, refused.stdout], [1, ''])
  t.match(refused.stderr, /window: 8, but it must be a whole number from 128/)
  t.equal((await run(join(dir, 'nothing'))).code, 1)
})
