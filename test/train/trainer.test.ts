import t from 'tap'
import { Llama } from '../../lib/model/llama.js'
import { Trainer } from '../../lib/train/trainer.js'
import { caseNames, norm, openGolden, relativeError } from '../golden.js'

// transformers' own float32 run is off by f32_vs_f64_delta_rel; ours may be off by 3 times that (or by 1e-4).
for (const name of caseNames) {
  t.test(`golden: ${name}`, async (t) => {
    const golden = await openGolden(name)
    const batches = await Promise.all([0, 1, 2].map((i) => golden.ints(`train_ids.${i}`)))
    for (const [variant, want] of Object.entries<any>(golden.json.adamw.variants)) {
      using model = await Llama.load(golden.dir, { device: 'cpu', dtype: 'float32' })
      using trainer = new Trainer(model, {
        learningRate: want.lr,
        weightDecay: want.weight_decay,
        maxGradNorm: want.max_norm,
        warmupSteps: 0,
      })
      const before = new Map<string, Float32Array>()
      for (const { name } of model.parameters()) before.set(name, (await model.read(name)).data as Float32Array)
      for (const [i, tokens] of batches.entries()) {
        const { loss, gradNorm, skipped } = await trainer.step(tokens)
        t.notOk(skipped)
        const lossError = Math.abs(loss / want.loss[i] - 1)
        t.ok(lossError < 1e-5, `${variant}: loss ${i} is off by ${lossError}`)
        const normError = Math.abs(gradNorm / want.grad_norm_before_clip[i] - 1)
        t.ok(normError < 1e-4, `${variant}: gradient norm ${i} is off by ${normError}`)
      }
      t.ok(Math.abs((await model.loss(batches[0]!)) / want.loss[3] - 1) < 1e-5, `${variant}: loss after`)
      const allowed = Math.max(3 * want.f32_vs_f64_delta_rel, 1e-4)
      let worst = 0
      for (const [name, old] of before) {
        const delta = ((await model.read(name)).data as Float32Array).map((value, n) => value - old[n]!)
        const normOf = Math.abs(norm(delta) / want.delta_norms[name] - 1)
        worst = Math.max(worst, normOf)
        t.ok(normOf <= allowed, `${variant}: |delta ${name}| is off by ${normOf}, allowed ${allowed}`)
        if (want.stored !== 'all' && !want.stored.includes(name)) continue
        const stored = await golden.floats(`delta.${variant}.${name}`)
        const error = relativeError(delta, stored.data)
        worst = Math.max(worst, error)
        t.ok(error <= allowed, `${variant}: delta ${name} is off by ${error}, allowed ${allowed}`)
      }
      if (process.env.ROPEWALK_VERBOSE) t.comment(`${name} ${variant}: worst ${worst}, allowed ${allowed}`)
    }
  })
}
