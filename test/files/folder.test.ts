import { execFileSync } from 'node:child_process'
import * as fs from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import t from 'tap'
import { didYouMean, formatBytes, quote, RopewalkError } from '../../lib/errors.js'
import { openModelFolder } from '../../lib/files/folder.js'
import { type TensorEntry, writeSafetensors } from '../../lib/files/safetensors.js'
import { saveModelFolder } from '../../lib/files/save.js'
import { listing } from './listing.js'

const fixtures = fileURLToPath(new URL('../fixtures/', import.meta.url))
const dir = fs.mkdtempSync(join(tmpdir(), 'ropewalk-folder-'))
t.teardown(() => fs.rmSync(dir, { recursive: true }))

let serial = 0
/** A copy of a fixture in which something is then spoilt. */
function copy(name: string, where = join(dir, `copy-${serial++}`)): string {
  fs.cpSync(join(fixtures, name), where, { recursive: true })
  return where
}

const entries = (folder: Awaited<ReturnType<typeof openModelFolder>>): TensorEntry[] =>
  [...folder.tensors].map(([name, { dtype, dims, bytes }]) => ({
    name,
    dtype,
    dims,
    bytes,
    data: () => folder.read(name),
  }))

const tiny = (name: string): TensorEntry => ({ name, dtype: 'F32', dims: [1], bytes: 4, data: () => new Uint8Array(4) })
const index = 'model.safetensors.index.json'

t.test('fixtures open', async (t) => {
  const single = await openModelFolder(join(fixtures, 'mha-f32'))
  t.equal(single.config.rms_norm_eps, 1e-5)
  t.ok(single.tensors.has('lm_head.weight'))
  t.match(single.tokenizerPath, /tokenizer\.json$/)
  t.equal(single.hasChatTemplate, false)
  t.strictSame(single.warnings, [])
  await single.close()
  const sharded = await openModelFolder(join(fixtures, 'sharded-tied-linear8'))
  const embed = sharded.tensors.get('model.embed_tokens.weight')
  t.match(embed, { dtype: 'F32', dims: [320, 40], bytes: 51200 })
  t.match(embed?.path, /model-00001-of-00003\.safetensors$/)
  t.equal((await sharded.read('model.norm.weight')).length, 160)
  await t.rejects(sharded.read('model.norn.weight'), /did you mean "model.norm.weight"/)
  t.equal(sharded.metadata.get('format'), 'pt')
  await sharded.close()
})

t.test('load -> save -> load -> save is byte-identical, single and sharded', async (t) => {
  for (const name of fs.readdirSync(fixtures)) {
    if (!fs.existsSync(join(fixtures, name, 'config.json'))) continue
    const first = join(dir, `${name}-1`)
    const second = join(dir, `${name}-2`)
    for (const [from, to] of [
      [join(fixtures, name), first],
      [first, second],
    ]) {
      const folder = await openModelFolder(from)
      const maxShardBytes = name.startsWith('sharded') ? 60000 : undefined
      const saved = await saveModelFolder(to, {
        config: folder.config,
        tensors: entries(folder),
        copyFrom: from,
        maxShardBytes,
      })
      t.strictSame(Object.fromEntries(saved.map((file) => [file.name, file.sha256])), { ...listing(to) })
      await folder.close()
    }
    t.strictSame(listing(second), listing(first), name)
    if (name.endsWith('-old')) continue
    const config = fs.readFileSync(join(fixtures, name, 'config.json'), 'utf8')
    t.equal(fs.readFileSync(join(first, 'config.json'), 'utf8').trim(), config.trim(), `${name}: config.json as it was`)
    if (!name.startsWith('sharded'))
      t.equal(listing(first)['model.safetensors'], listing(join(fixtures, name))['model.safetensors'])
  }
  const map = JSON.parse(fs.readFileSync(join(dir, 'sharded-tied-linear8-1', index), 'utf8'))
  t.equal(map.metadata.total_size, 159520)
  t.ok(fs.existsSync(join(dir, 'sharded-tied-linear8-1', 'model-00001-of-00003.safetensors')))
})

t.test('what is missing or of another kind', async (t) => {
  const none = join(dir, 'none')
  await t.rejects(openModelFolder(none), { code: 'ERR_NOT_FOUND', message: /none: no such folder: check the path/ })
  fs.mkdirSync(`${none}.old-17-ab`)
  await t.rejects(openModelFolder(none), { message: /a save was interrupted.*none\.old-17-ab: rename it back/ })
  const file = join(fixtures, 'mha-f32', 'model.safetensors')
  await t.rejects(openModelFolder(file), { code: 'ERR_NOT_A_FOLDER', message: /give .*mha-f32$/ })

  const cases: [string, (where: string) => void, any][] = [
    [
      'no config',
      (w) => fs.renameSync(join(w, 'config.json'), join(w, 'conifg.json')),
      { code: 'ERR_NOT_FOUND', message: /no config\.json; did you mean "conifg\.json"/ },
    ],
    [
      'a broken config',
      (w) => fs.writeFileSync(join(w, 'config.json'), '{"a":1,"a":2}'),
      { code: 'ERR_JSON', message: /config\.json: line 1, byte 7: the key "a"/ },
    ],
    ['a config that is a list', (w) => fs.writeFileSync(join(w, 'config.json'), '[]'), { code: 'ERR_JSON' }],
    [
      'a config that is a folder',
      (w) => {
        fs.rmSync(join(w, 'config.json'))
        fs.mkdirSync(join(w, 'config.json'))
      },
      { code: 'ERR_NOT_A_FILE' },
    ],
    ['a huge config', (w) => fs.truncateSync(join(w, 'config.json'), 17 << 20), { code: 'ERR_TOO_LARGE' }],
    [
      'no weights',
      (w) => fs.rmSync(join(w, 'model.safetensors')),
      { code: 'ERR_NOT_FOUND', message: /neither model\.safetensors nor/ },
    ],
    [
      'other weights',
      (w) => fs.renameSync(join(w, 'model.safetensors'), join(w, 'adapter_model.safetensors')),
      { message: /it has adapter_model\.safetensors/ },
    ],
    [
      'truncated weights',
      (w) => fs.truncateSync(join(w, 'model.safetensors'), 5000),
      { code: 'ERR_SAFETENSORS', message: /model\.safetensors: .*truncated: re-download/ },
    ],
    ...['pytorch_model.bin', 'consolidated.00.pth', 'model.pt', 'last.ckpt', 'pytorch_model.bin.index.json'].map(
      (name): [string, (where: string) => void, any] => [
        name,
        (w) => fs.renameSync(join(w, 'model.safetensors'), join(w, name)),
        {
          code: 'ERR_PICKLE',
          message: new RegExp(`${name.replaceAll('.', '\\.')}: a PyTorch pickle.*Convert it once`),
        },
      ],
    ),
    [
      'pickle under our name',
      (w) => fs.writeFileSync(join(w, 'model.safetensors'), 'PK\x03\x04\x14\x00\x00\x00\x08\x00'),
      { code: 'ERR_PICKLE' },
    ],
    [
      'a FIFO',
      (w) => {
        fs.rmSync(join(w, 'model.safetensors'))
        execFileSync('mkfifo', [join(w, 'model.safetensors')])
      },
      { code: 'ERR_NOT_A_FILE' },
    ],
    [
      'a broken link',
      (w) => {
        fs.rmSync(join(w, 'tokenizer.json'))
        fs.symlinkSync('nowhere', join(w, 'tokenizer.json'))
      },
      { code: 'ERR_NOT_FOUND', message: /tokenizer\.json: does not exist, or is a link to nothing/ },
    ],
  ]
  for (const [name, spoil, expected] of cases) {
    const where = copy('mha-f32')
    spoil(where)
    await t.rejects(openModelFolder(where), expected, name)
  }
  const nested = copy('mha-f32')
  fs.rmSync(join(nested, 'tokenizer.json'))
  fs.mkdirSync(join(nested, 'tokenizer.json'))
  await t.rejects(openModelFolder(nested), { code: 'ERR_NOT_A_FILE', message: /tokenizer\.json: not a regular file/ })
  const both = copy('mha-f32')
  fs.writeFileSync(join(both, 'pytorch_model.bin'), 'x')
  fs.writeFileSync(join(both, index), '{}')
  fs.writeFileSync(
    join(both, 'tokenizer_config.json'),
    '{"chat_template": "x", "model_max_length": 1000000000000000019884624838656}',
  )
  fs.writeFileSync(join(both, 'generation_config.json'), '{"top_p": 1}')
  const folder = await openModelFolder(both)
  t.match(folder.warnings, [/both model\.safetensors and/, /pytorch_model\.bin: pickle files are never read/])
  t.equal(folder.hasChatTemplate, true)
  t.strictSame({ ...folder.generationConfig }, { top_p: 1 })
  await folder.close()
})

t.test('a shard index names plain files of its folder, and agrees with them', async (t) => {
  const secret = join(dir, 'secret.safetensors')
  await writeSafetensors(secret, [tiny('stolen')])
  const names: unknown[] = [
    '../secret.safetensors',
    secret,
    './model-00001-of-00003.safetensors',
    'a/b.safetensors',
    'a\\b.safetensors',
    '..',
    '.',
    '',
    '..\\secret.safetensors',
    'C:\\secret.safetensors',
    'C:secret.safetensors',
    'model\0.safetensors',
    '/dev/zero',
    '/proc/self/mem',
    '~/x/secret.safetensors',
    'file:secret.safetensors',
    '..\u2215..\\x.safetensors',
    '/../secret.safetensors',
    '....//secret.safetensors',
    'x/../../secret.safetensors',
    '\\\\server\\share.safetensors',
  ]
  for (const name of names) {
    const where = copy('sharded-tied-linear8')
    fs.writeFileSync(join(where, index), JSON.stringify({ weight_map: { stolen: name } }))
    await t.rejects(
      openModelFolder(where),
      { code: 'ERR_PATH', message: /index\.json: weight_map: "stolen": .* not a plain file name/ },
      String(name),
    )
  }
  const change = (edit: (map: Record<string, any>, where: string) => unknown) => {
    const where = copy('sharded-tied-linear8')
    const document = JSON.parse(fs.readFileSync(join(where, index), 'utf8'))
    const changed = edit(document.weight_map, where)
    fs.writeFileSync(join(where, index), JSON.stringify({ ...document, weight_map: changed ?? document.weight_map }))
    return where
  }
  const norm = 'model.norm.weight'
  const cases: [string, string, any][] = [
    [
      'missing shard',
      change((_, w) => fs.rmSync(join(w, 'model-00002-of-00003.safetensors'))),
      { code: 'ERR_NOT_FOUND', message: /model-00002-of-00003\.safetensors: missing, but .*index\.json names it/ },
    ],
    [
      'tensor not in its shard',
      change((map) => void (map.extra = 'model-00001-of-00003.safetensors')),
      { code: 'ERR_INDEX', message: /model-00001.*tensor "extra" is missing, but model\.safetensors\.index\.json/ },
    ],
    [
      'tensor in another shard',
      change((map) => void (map[norm] = 'model-00001-of-00003.safetensors')),
      { code: 'ERR_INDEX', message: /"model\.norm\.weight"/ },
    ],
    [
      'tensor not in the index',
      change((map) => void delete map[norm]),
      { code: 'ERR_INDEX', message: /holds tensor "model\.norm\.weight", but .* does not list it/ },
    ],
    [
      'a name that is no string',
      change((map) => void (map[norm] = 3)),
      { code: 'ERR_INDEX', message: /"model\.norm\.weight": 3, but it must be a file name/ },
    ],
    ['no map', change(() => 'x'), { code: 'ERR_INDEX', message: /weight_map: "x"/ }],
    ['a pickle shard', change((map) => void (map[norm] = 'pytorch_model-00001-of-00002.bin')), { code: 'ERR_PICKLE' }],
    [
      'another extension',
      change((map) => void (map[norm] = 'config.json')),
      { code: 'ERR_INDEX', message: /does not end in \.safetensors/ },
    ],
    [
      'a shard that is a folder',
      change((_, w) => {
        fs.rmSync(join(w, 'model-00002-of-00003.safetensors'))
        fs.mkdirSync(join(w, 'model-00002-of-00003.safetensors'))
      }),
      { code: 'ERR_NOT_A_FILE' },
    ],
    [
      'a shard that is a link to a device',
      change((_, w) => {
        fs.rmSync(join(w, 'model-00002-of-00003.safetensors'))
        fs.symlinkSync('/dev/zero', join(w, 'model-00002-of-00003.safetensors'))
      }),
      { code: 'ERR_PATH' },
    ],
  ]
  for (const [name, where, expected] of cases) await t.rejects(openModelFolder(where), expected, name)
  const doubled = copy('sharded-tied-linear8')
  fs.writeFileSync(join(doubled, index), `{"weight_map":{"${norm}":"model-00001-of-00003.safetensors","${norm}":"x"}}`)
  await t.rejects(openModelFolder(doubled), { code: 'ERR_JSON', message: /stands twice/ })
})

t.test('links: inside the folder and to the blobs of the cache, nowhere else', async (t) => {
  const open = async (where: string) => (await openModelFolder(where)).close()
  const link = (where: string, name: string, to: string) => {
    fs.rmSync(join(where, name))
    fs.symlinkSync(to, join(where, name))
  }
  const inside = copy('mha-f32')
  fs.renameSync(join(inside, 'model.safetensors'), join(inside, 'weights'))
  fs.symlinkSync('weights', join(inside, 'model.safetensors'))
  await t.resolves(open(inside), 'a link inside the folder')
  const whole = join(dir, 'link-to-folder')
  fs.symlinkSync(inside, whole)
  await t.resolves(open(whole), 'the folder itself may be a link')

  // ~/.cache/huggingface/hub/models--org--name/{blobs/<hash>, snapshots/<revision>/model.safetensors -> ../../blobs/<hash>}
  const cache = (model: string) => {
    const snapshot = join(dir, 'hub', model, 'snapshots', '0123abc')
    copy('mha-f32', snapshot)
    fs.mkdirSync(join(dir, 'hub', model, 'blobs', 'deep'), { recursive: true })
    for (const name of fs.readdirSync(snapshot)) {
      fs.renameSync(join(snapshot, name), join(dir, 'hub', model, 'blobs', `hash-${name}`))
      fs.symlinkSync(`../../blobs/hash-${name}`, join(snapshot, name))
    }
    return snapshot
  }
  const snapshot = cache('models--org--name')
  await t.resolves(open(snapshot), 'a snapshot of the Hugging Face cache')
  const folder = await openModelFolder(snapshot)
  t.match(
    folder.tensors.get('lm_head.weight')?.path,
    /blobs\/hash-model\.safetensors$/,
    'the real file, to be opened without links',
  )
  await folder.close()

  const outside = join(fixtures, 'mha-f32', 'model.safetensors')
  const escapes: [string, (name: string) => string][] = [
    ['an absolute link out of the folder', () => outside],
    ['a relative link out of the folder', () => '../secret.safetensors'],
    ['a device', () => '/dev/zero'],
    ['a folder whose name begins like ours', (where) => `../${where.split('/').pop()}-evil/model.safetensors`],
  ]
  for (const [name, to] of escapes) {
    const where = copy('mha-f32')
    copy('mha-f32', `${where}-evil`)
    link(where, 'model.safetensors', to(where))
    await t.rejects(
      open(where),
      { code: 'ERR_PATH', message: /model\.safetensors: a link to .*outside the model folder/ },
      name,
    )
  }
  for (const name of ['config.json', 'tokenizer.json']) {
    const where = copy('mha-f32')
    link(where, name, join(fixtures, 'mha-f32', name))
    await t.rejects(open(where), { code: 'ERR_PATH' }, name)
  }
  link(snapshot, 'model.safetensors', outside)
  await t.rejects(open(snapshot), { code: 'ERR_PATH' }, 'a snapshot leads to its own blobs only')
  cache('models--org--other')
  link(snapshot, 'model.safetensors', '../../../models--org--other/blobs/hash-model.safetensors')
  await t.rejects(open(snapshot), { code: 'ERR_PATH' }, "not to another model's blobs")
  fs.renameSync(
    join(dir, 'hub/models--org--name/blobs/hash-model.safetensors'),
    join(dir, 'hub/models--org--name/blobs/deep/m'),
  )
  link(snapshot, 'model.safetensors', '../../blobs/deep/m')
  await t.rejects(open(snapshot), { code: 'ERR_PATH' }, 'blobs lie in blobs itself')
  const odd = cache('models--org--odd')
  fs.renameSync(join(odd, '..'), join(odd, '..', '..', 'snapshot'))
  await t.rejects(open(join(dir, 'hub/models--org--odd/snapshot/0123abc')), { code: 'ERR_PATH' }, 'no snapshots folder')
  await t.rejects(open(cache('no-model')), { code: 'ERR_PATH' }, 'a folder that only looks alike')
})

t.test('messages', async (t) => {
  t.equal(didYouMean('linaer', ['default', 'linear']), '; did you mean "linear"?')
  t.equal(didYouMean('bananas', ['default', 'linear']), '')
  t.equal(didYouMean('', ['x']), '; did you mean "x"?')
  t.equal(quote('a"b'), '"a\\"b"')
  t.equal(quote('x'.repeat(1e6)).length, 80)
  t.equal(quote(undefined), 'undefined')
  t.equal(quote(5n), '5')
  t.equal(formatBytes(5), '5 bytes')
  t.equal(formatBytes(3 << 20), '3145728 bytes (3.0 MiB)')
  const error = new RopewalkError('ERR_X', 'message', { cause: 1 })
  t.match(error, { name: 'RopewalkError', code: 'ERR_X', message: 'message', cause: 1 })
})
